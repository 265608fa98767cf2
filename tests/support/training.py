"""What tests of training share beside whole runs: samples, adapted toys, and their gradients."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import torch

from convert.config import TrainConfig
from convert.data.encode import Sample
from convert.train import load_model


def sample(tokens: int, *, prompt: int = 2, seed: int = 0, name: str = "r") -> Sample:
    """Random tokens of the toy, learnt behind the first `prompt` ones."""
    ids = torch.randint(3, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(name, array("i", ids), ((prompt, tokens),))


def plain(base: Path) -> Any:
    """The base in float32, in eval mode."""
    return load_model.load_model(base, load_model.Place("cpu", torch.float32, False)).eval()


def adapted(
    base: Path, config: TrainConfig, *, four_bit: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """The base with an adapter whose B is not zero, for that would hide half of the gradients."""
    model = load_model.add_adapter(
        load_model.load_model(base, load_model.Place("cpu", dtype, four_bit)), config
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model.train()


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([one.grad.flatten().float() for one in model.parameters() if one.grad is not None])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 60, 7, 80, 9, 100]])).logits.float()
