"""An adapter as it is read: of a training's end, and of a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.model.lora_adapter import known_adapter, read_adapter
from edge.artefact import manifest
from edge.errors import InputError
from tests.support.families import make_adapter
from tests.support.toy import make_model


@pytest.mark.slow
def test_a_checkpoint_is_read_as_the_adapter_that_it_holds(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "run" / "adapter", base)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir()
    shutil.copy(adapter / "adapter_config.json", checkpoint)
    weights = load_file(adapter / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
    save_file(named, checkpoint / "trained.safetensors")
    manifest.write(checkpoint, manifest.Manifest("checkpoint", "run, step 1"))
    ours, theirs = read_adapter(checkpoint).updates, read_adapter(adapter).updates
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, update in ours.items():
        assert torch.equal(update.delta(), theirs[name].delta())
    assert known_adapter(checkpoint, checkpoint=True).name == "run, step 1"
    with pytest.raises(InputError, match="is a checkpoint, not an adapter"):
        known_adapter(checkpoint)
