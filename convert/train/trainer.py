"""The training loop: batches by length, gradients weighted by tokens, and a stop at the first bad number.

Everything that decides how a run goes on is here and can be saved: weights, optimizer, position in the data,
random numbers. A resumed run ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from convert.config import TrainConfig
from convert.train.distributed import World
from convert.train.load_model import dtype_name
from convert.train.losses import LossHead, Objective, by_length
from edge.errors import EdgeError, UnavailableError

# Shuffled rows are sorted by length in windows of so many batches: little padding, still random.
_WINDOW = 16


@dataclass
class Progress:
    """Where training stands. loss: mean per learnt token (or pair) of the last step; smooth: its moving
    average. rate: learning rate. tokens: without padding, since the start; seconds: spent in steps, over all
    resumptions; first: in the first step. history: lines of trainer_log.jsonl."""

    step: int = 0
    total: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    smooth: float = 0.0
    rate: float = 0.0
    norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def remaining(self) -> float:
        """Seconds to the end at the speed so far; the first step, which warms up, does not count."""
        if self.step < 2:
            return math.inf
        return (self.seconds - self.first) / (self.step - 1) * (self.total - self.step)


def batches(items: list[Any], size: int, shuffle: random.Random | None) -> list[list[Any]]:
    """One epoch's batches of at most `size` rows of like length, shuffled; in their order for None."""
    if shuffle is None:
        return [items[start : start + size] for start in range(0, len(items), size)]
    order = list(items)
    shuffle.shuffle(order)
    window = _WINDOW * size
    groups: list[list[Any]] = []
    for start in range(0, len(order), window):
        groups += by_length(order[start : start + window], size)
    shuffle.shuffle(groups)
    return groups


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


def steps_in_epoch(config: TrainConfig, rows: int, world: int = 1) -> int:
    in_epoch = math.ceil(rows / config.per_device_train_batch_size)
    return math.ceil(in_epoch / (config.gradient_accumulation_steps * world))


def total_steps(config: TrainConfig, rows: int, world: int = 1) -> int:
    """Optimizer steps for `rows` training rows on `world` processes."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * steps_in_epoch(config, rows, world)))


class Loop:
    """Trains the parameters of `model` that require gradients.

    A step's gradient is that of the mean over all its learnt tokens, however they fall into micro-batches and
    processes.
    """

    def __init__(
        self,
        model: Any,
        items: list[Any],
        config: TrainConfig,
        *,
        device: str,
        dtype: torch.dtype,
        objective: Objective | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.world = world or World()
        self.objective: Objective = objective or LossHead(model)
        self.items = items
        groups = _groups_of(model, config.loraplus_lr_ratio or 1.0)
        self.parameters = [one for group in groups for one in group["params"]]
        self.optimizer = _optimizer(groups, config, device)
        # float16 gradients underflow without a scale; too large a scale overflows, and is halved, by design.
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.state = Progress(total=total_steps(config, len(items), self.world.shares))
        # The random numbers of the step that comes next.
        self.random = random_state(device)

    def run(
        self,
        report: Callable[[Progress], bool | None],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> Progress:
        """Train to the end, until `report` (called after each step) returns True, or until `stop` does.

        A stop takes effect between two micro-batches; the gradients of the unfinished step are dropped.
        Raises EdgeError, naming step, dtype and rows, at the first loss or gradient that is NaN or infinite.
        """
        state = self.state
        if state.step >= state.total:
            return state
        self.model.train()
        remove_noise = self._noise()
        set_random_state(self.random, self.device)
        try:
            for epoch, group in self._groups(state.step):
                if not self._step(epoch, group, stop):
                    state.stopped = True
                    break
                self.random = random_state(self.device)
                if report(state):
                    break
                set_random_state(self.random, self.device)
                self.model.train()
        finally:
            remove_noise()
        return state

    def _step(self, epoch: float, group: list[list[Any]], stop: Callable[[], bool]) -> bool:
        """One optimizer step; False, with nothing changed, where a stop came first."""
        state, world, scaler = self.state, self.world, self.scaler
        began = time.monotonic()
        if world.size > 1 and world.total(float(stop()))[0]:
            return False  # all processes stop at the same step
        rate = learning_rate(self.config, state.step, state.total)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["scale"]
        weight = sum(self.objective.weight(batch) for batch in group)
        values: list[torch.Tensor] = []
        mine = world.share(group)
        for batch, counts in mine:
            if world.size == 1 and stop():
                self.optimizer.zero_grad(set_to_none=False)
                return False
            losses, _ = self.objective(batch, self.device)
            value = losses.sum() / weight * counts
            scaler.scale(value).backward()
            values.append(value.detach())
        world.add_gradients(self.parameters)
        scaler.unscale_(self.optimizer)
        norms = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        # The GPU is waited for here, once a step, before anything is changed.
        *amounts, norm = torch.stack([*values, norms.to(values[0])] if values else [norms]).tolist()
        wrong = [
            index
            for index, amount in enumerate(amounts)
            if not math.isfinite(amount) or (not amount and mine[index][1] and self.objective.zero_is_bad)
        ]
        (total,) = world.total(math.nan if wrong else sum(amounts))
        if wrong:
            raise self._bad_loss(amounts[wrong[0]], mine[wrong[0]][0])
        if math.isnan(total):
            raise EdgeError(f"step {state.step + 1}: another process met a loss that is NaN or infinite")
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1.0):
            names = ", ".join(item.source for batch in group for item in batch[:3])
            raise EdgeError(
                f"step {state.step + 1}: the gradient is {norm} in {dtype_name(self.dtype)} "
                f"(rows: {names}, ...)",
                "lower learning_rate, or compute in bf16",
            )
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        state.step += 1
        state.smooth = total if state.step == 1 else 0.9 * state.smooth + 0.1 * total
        state.epoch, state.loss, state.rate, state.norm = epoch, total, rate, norm
        state.tokens += sum(item.tokens for batch in group for item in batch)
        spent = time.monotonic() - began
        state.seconds += spent
        state.first = state.first or spent
        return True

    def _groups(self, done: int) -> Iterator[tuple[float, list[list[Any]]]]:
        """Groups of micro-batches behind the first `done`, each with the epochs that are done after it."""
        config = self.config
        shuffle = None if config.disable_shuffling else random.Random(config.seed)
        in_step = config.gradient_accumulation_steps * self.world.shares
        step = epoch = 0
        while True:
            micro = batches(self.items, config.per_device_train_batch_size, shuffle)
            for start in range(0, len(micro), in_step):
                step += 1
                if step > done:
                    share = min(1.0, (start + in_step) / len(micro))
                    yield epoch + share, micro[start : start + in_step]
                if step == self.state.total:
                    return
            epoch += 1

    def _noise(self) -> Any:
        """Add NEFTune's noise to the embeddings: uniform within alpha/sqrt(tokens x width).

        See arXiv:2310.05914. Returns what removes it again.
        """
        alpha = self.config.neftune_noise_alpha
        if not alpha:
            return lambda: None

        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if not self.model.training:
                return output
            bound = alpha / math.sqrt(output.shape[1] * output.shape[2])
            return output + torch.empty_like(output).uniform_(-bound, bound)

        return self.model.get_input_embeddings().register_forward_hook(add).remove

    def _bad_loss(self, amount: float, batch: list[Any]) -> EdgeError:
        wrong = set(range(len(batch)))
        # The single tokens' losses, for the rows' names; sharded weights would need the other processes.
        if not self.world.sharded:
            with torch.no_grad():
                losses, rows = self.objective(batch, self.device)
            wrong = set(rows[~torch.isfinite(losses.detach().cpu())].tolist()) or wrong
        names = ", ".join(batch[row].source for row in sorted(wrong)[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        return EdgeError(
            f"step {self.state.step + 1}: the loss is {amount} in {dtype_name(self.dtype)} "
            f"(rows: {names}{more})",
            "look at these rows, lower learning_rate, or compute in bf16",
        )


def evaluate(
    model: Any,
    items: list[Any],
    *,
    size: int,
    device: str,
    objective: Objective | None = None,
    world: World | None = None,
) -> float:
    """Mean loss per learnt token (or pair) over `items`, without gradients."""
    objective, world = objective or LossHead(model), world or World()
    was_training = model.training
    model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for batch, counts in world.share(list(by_length(items, size))):
            losses, _ = objective(batch, device)
            total += float(losses.sum()) * counts
            weight += objective.weight(batch) * counts
    model.train(was_training)
    total, weight = world.total(total, weight)
    return total / max(1.0, weight)


def random_state(device: str) -> dict[str, torch.Tensor]:
    """What torch's random numbers come from: for the CPU, and for a CUDA device."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"])
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        size, cut = config.per_device_train_batch_size, config.cutoff_len
        raise EdgeError(
            f"the device's memory is full: {(str(error) or 'no more memory').splitlines()[0]}",
            f"lower per_device_train_batch_size (now {size}) or cutoff_len (now {cut}), raise "
            "gradient_accumulation_steps instead",
        ) from error


def _groups_of(model: Any, ratio: float) -> list[dict[str, Any]]:
    """What is trained, as groups of an optimizer. scale: of the learning rate.

    LoRA+ (arXiv:2402.12354): an adapter's B matrices, and what it holds of one axis, learn `ratio` times as
    fast as its A matrices.
    """
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    fast = {name for name, one in trained if ratio != 1.0 and ("lora_B" in name or one.ndim == 1)}
    groups = [
        ([one for name, one in trained if (name in fast) == is_fast], is_fast) for is_fast in (False, True)
    ]
    return [
        {"params": flattened(group), "scale": ratio if is_fast else 1.0} for group, is_fast in groups if group
    ]


def _optimizer(parameters: list[dict[str, Any]], config: TrainConfig, device: str) -> Any:
    how: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    how |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optim == "paged_adamw_8bit":
        if not device.startswith("cuda"):
            raise UnavailableError(
                f"optim: paged_adamw_8bit needs CUDA, training runs on {device}", "optim: adamw_torch"
            )
        return _paged_adamw_8bit()(parameters, **how)
    return torch.optim.AdamW(parameters, fused=device != "mps", **how)


def _paged_adamw_8bit() -> Any:
    """bitsandbytes' optimizer, in order with what comes before and after a step on the current stream."""
    import bitsandbytes

    class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            # It launches kernels on the default stream, whichever is current; state is made there too.
            own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(own)
            with torch.cuda.stream(default):
                loss = super().step(closure)
            own.wait_stream(default)
            return loss

    return PagedAdamW8bit


def flattened(parameters: list[Any]) -> list[Any]:
    """One flat parameter for each type, of which the given ones become views, and their gradients of its one.

    The optimizer then makes a few calls in place of a few for each of hundreds of small matrices.
    """
    flat = []
    for dtype in dict.fromkeys(one.dtype for one in parameters):
        same = [one for one in parameters if one.dtype == dtype]
        whole = torch.nn.Parameter(torch.cat([one.data.flatten() for one in same]))
        whole.grad = torch.zeros_like(whole)
        sizes = [one.numel() for one in same]
        for one, data, grad in zip(same, whole.data.split(sizes), whole.grad.split(sizes), strict=True):
            one.data, one.grad = data.view(one.shape), grad.view(one.shape)
        flat.append(whole)
    return flat
