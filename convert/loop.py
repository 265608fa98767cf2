"""The training loop: batches by length, gradients weighted by tokens, and a stop at the first bad number."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from convert.encode import IGNORED, Sample
from edge.config import TrainConfig
from edge.errors import EdgeError, UnavailableError

# So many batches' worth of shuffled rows are sorted by length together: little padding, still random.
_WINDOW = 16


@dataclass
class Progress:
    """Where training stands. loss: mean per learnt token of the last step. tokens: real ones, since start."""

    step: int = 0
    total: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def remaining(self) -> float:
        """Seconds to the end at the pace so far."""
        return self.seconds / self.step * (self.total - self.step) if self.step else math.inf


def batches(samples: list[Sample], size: int, shuffle: random.Random | None) -> list[list[Sample]]:
    """One epoch's batches of at most `size` rows of like length, shuffled (by length for None)."""
    order = list(samples)
    window = len(order) or 1
    if shuffle is not None:
        shuffle.shuffle(order)
        window = _WINDOW * size
    made = []
    for at in range(0, len(order), window):
        near = sorted(order[at : at + window], key=lambda sample: len(sample.ids))
        made += [near[i : i + size] for i in range(0, len(near), size)]
    if shuffle is not None:
        shuffle.shuffle(made)
    return made


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: a linear warm-up, then transformers' schedules."""
    kind = config.lr_scheduler_type
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if kind == "constant":
        return config.learning_rate
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if kind == "constant_with_warmup":
        return config.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    share = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * share


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps for `rows` training rows."""
    if config.max_steps > 0:
        return config.max_steps
    in_epoch = math.ceil(rows / config.per_device_train_batch_size)
    return max(
        1, math.ceil(config.num_train_epochs * math.ceil(in_epoch / config.gradient_accumulation_steps))
    )


class LossHead:
    """Sums of token losses, with logits made only where a token is learnt.

    The output head's input is cut down to those positions on its way in, so that a large vocabulary costs
    memory and time for answers only, whatever the architecture does behind its head.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keep: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._cut)

    def _cut(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if self._keep is None else (inputs[0][self._keep], *inputs[1:])

    def __call__(self, batch: list[Sample], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, rows): one float32 loss per learnt token of `batch`, and the index of the row it is in."""
        longest = max(len(sample.ids) for sample in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), IGNORED)
        for at, sample in enumerate(batch):
            ids[at, : len(sample.ids)] = torch.tensor(sample.ids)
            labels[at, : len(sample.ids)] = torch.tensor(sample.labels)
        # What comes before position t predicts the token at t.
        targets = torch.full_like(labels, IGNORED)
        targets[:, :-1] = labels[:, 1:]
        keep = targets != IGNORED
        rows = keep.nonzero()[:, 0]
        self._keep = keep.to(device)
        try:
            # Padding is on the right and attention is causal: no learnt token can see it, no mask is needed.
            logits = self._model(input_ids=ids.to(device), use_cache=False).logits
        finally:
            self._keep = None
        losses = functional.cross_entropy(logits.float(), targets[keep].to(device), reduction="none")
        return losses, rows


def learnt(batch: list[Sample]) -> int:
    """Tokens with loss; the first of a row has nothing before it that could predict it."""
    return sum(label != IGNORED for sample in batch for label in sample.labels[1:])


def train(
    model: Any,
    samples: list[Sample],
    config: TrainConfig,
    *,
    device: str,
    dtype: torch.dtype,
    report: Callable[[Progress], None],
) -> Progress:
    """Train the parameters of `model` that require gradients. `report` is called after every step.

    A step's gradient is that of the mean over all its learnt tokens, however they fall into micro-batches.
    Raises EdgeError, naming step, dtype and rows, at the first loss or gradient that is no number.
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = _optimizer(parameters, config, device)
    # float16 gradients vanish without a scale; too large a scale overflows, and is halved, by design.
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    head = LossHead(model)
    state = Progress(total=total_steps(config, len(samples)))
    model.train()
    began = time.monotonic()
    for epoch, group in _groups(samples, config, state.total):
        rate = learning_rate(config, state.step, state.total)
        for one in optimizer.param_groups:
            one["lr"] = rate
        tokens = sum(learnt(batch) for batch in group)
        total = 0.0
        for batch in group:
            losses, rows = head(batch, device)
            value = losses.sum() / tokens
            amount = float(value.detach())
            if not math.isfinite(amount) or not amount:
                raise _bad_loss(amount, losses, rows, batch, state.step + 1, dtype)
            scaler.scale(value).backward()
            total += amount
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1.0):
            names = ", ".join(sample.source for batch in group for sample in batch[:3])
            raise EdgeError(
                f"step {state.step + 1}: the gradient is {norm} in {_name(dtype)} (rows: {names}, ...)",
                "lower learning_rate, or compute in bf16; nothing was saved",
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.epoch, state.loss, state.rate, state.norm = epoch, total, rate, norm
        state.tokens += sum(len(sample.ids) for batch in group for sample in batch)
        state.seconds = time.monotonic() - began
        report(state)
    return state


def evaluate(model: Any, samples: list[Sample], *, size: int, device: str) -> float:
    """Mean loss per learnt token over `samples`, without gradients."""
    head = LossHead(model)
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(samples, size, None):
            losses, _ = head(batch, device)
            total += float(losses.sum())
            tokens += len(losses)
    model.train(was_training)
    return total / max(1, tokens)


@contextlib.contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, cut = config.per_device_train_batch_size, config.cutoff_len
        raise EdgeError(
            f"the device's memory is full: {str(error).splitlines()[0]}",
            f"lower per_device_train_batch_size (now {size}) or cutoff_len (now {cut}), raise "
            "gradient_accumulation_steps instead",
        ) from error


def _groups(
    samples: list[Sample], config: TrainConfig, total: int
) -> Iterator[tuple[float, list[list[Sample]]]]:
    """`total` groups of micro-batches, each with the epochs that are done after it."""
    shuffle = random.Random(config.seed)
    accumulated = config.gradient_accumulation_steps
    step = epoch = 0
    while True:
        made = batches(samples, config.per_device_train_batch_size, shuffle)
        for at in range(0, len(made), accumulated):
            yield epoch + min(1.0, (at + accumulated) / len(made)), made[at : at + accumulated]
            step += 1
            if step == total:
                return
        epoch += 1


def _optimizer(parameters: list[Any], config: TrainConfig, device: str) -> Any:
    how = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optim == "paged_adamw_8bit":
        if device != "cuda":
            raise UnavailableError(
                f"optim: paged_adamw_8bit needs CUDA, training runs on {device}", "optim: adamw_torch"
            )
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(parameters, **how)
    return torch.optim.AdamW(parameters, **how)


def _bad_loss(
    amount: float,
    losses: torch.Tensor,
    rows: torch.Tensor,
    batch: list[Sample],
    step: int,
    dtype: torch.dtype,
) -> EdgeError:
    wrong = set(rows[~torch.isfinite(losses.detach().cpu())].tolist()) or set(range(len(batch)))
    names = ", ".join(batch[row].source for row in sorted(wrong)[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return EdgeError(
        f"step {step}: the loss is {amount} in {_name(dtype)} (rows: {names}{more})",
        "look at these rows, lower learning_rate, or compute in bf16; nothing was saved",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
