"""What training minimises: the loss of a learnt token (sft, pt), of two answers (dpo) or one (kto)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from convert.config import TrainConfig
from convert.data.encode import IGNORED, Judged, Pair, Sample


class Body(Protocol):
    """The part of a model below its output head."""

    def __call__(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """(tokens, width): the last hidden state of each of `ids` (tokens,), which are rows of `lengths`."""


class Objective(Protocol):
    """zero_is_bad: whether a loss of exactly 0 can only come of a fault."""

    zero_is_bad: bool

    def weight(self, batch: list[Any]) -> float:
        """The batch's part of what a step's sum of losses is divided by: learnt tokens, or pairs."""

    def __call__(self, batch: list[Any], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, rows): float32 losses, and for each the index in `batch` that it belongs to."""


# Logits made at once: a hundred tokens by a vocabulary of 150,000, 0.2 GiB with what is computed from them.
_LOGITS = 1 << 24


class TokenLoss(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy of `hidden` (tokens, width) through a head (vocabulary, width), a piece at a time.

    Only one piece of the logits is ever held, and its gradient is computed with it: each token's loss depends
    on its own hidden state alone. Returns float32 (tokens,). The weight gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = loss_rows(len(hidden), hidden.shape[1], len(weight))
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            piece, wanted = slice(start, start + rows), targets[start : start + rows, None]
            logits = (hidden[piece] @ weight.T).float()
            total = torch.logsumexp(logits, -1, keepdim=True)
            losses[piece] = (total - logits.gather(-1, wanted))[:, 0]
            if gradient is not None:
                # Of a token's loss by its logits: softmax, less 1 at the target.
                slope = logits.sub_(total).exp_()
                slope.scatter_add_(-1, wanted, slope.new_full(wanted.shape, -1.0))
                gradient[piece] = slope.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(gradient.dtype), None, None


def loss_rows(tokens: int, width: int, vocabulary: int) -> int:
    """Tokens whose logits are made at once: more where the hidden states take as much memory anyway."""
    return max(16, max(_LOGITS, tokens * width) // vocabulary // 16 * 16)


def head_is_more(model: Any) -> str:
    """Why the model's logits are more than hidden states times a frozen weight ("" if they are not).

    Tried out on a few tokens.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return "its output head is trained, or is more than a weight"
    outputs: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            ids = torch.arange(8, device=head.weight.device)[None]
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(outputs) != 1 or outputs[0] is not logits:
        return "it changes its logits after the output head"
    return ""


class LossHead:
    """Losses of tokens, with logits made only where a token is learnt.

    A hook cuts the output head's input down to those positions, so that a large vocabulary costs memory and
    time for answers only. Where the head is no more than its weight, nothing goes through it: logits are made
    a piece at a time, see TokenLoss. Rows packed into one sequence have positions of their own, by which
    transformers keeps them from seeing each other.

    body: computes the hidden states of padding-free rows instead (see `convert.train.cuda_graphs`), of a
    model whose head is no more than its weight.
    """

    zero_is_bad = True

    def __init__(self, model: Any, *, autocast: torch.dtype | None = None, body: Body | None = None) -> None:
        self._model = model
        self._autocast = autocast
        self._body = body
        self._in_pieces = body is not None or not head_is_more(model)

    def weight(self, batch: list[Sample]) -> float:
        return sum(sample.learnt for sample in batch)

    def __call__(self, batch: list[Sample], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, rows): one float32 loss per learnt token of `batch`, and the index of the row it is in."""
        if self._body is not None:
            return self._padding_free(self._body, batch)
        ids = pad_sequence([torch.tensor(sample.ids, dtype=torch.long) for sample in batch], batch_first=True)
        longest = ids.shape[1]
        positions = torch.arange(longest).repeat(len(batch), 1)
        targets = torch.full_like(ids, IGNORED)
        for index, sample in enumerate(batch):
            for start, end in sample.spans:
                # What comes before position t predicts the token at t.
                targets[index, start - 1 : end - 1] = ids[index, start:end]
            for start in sample.starts[1:]:
                positions[index, start:] = torch.arange(longest - start)
        keep = targets != IGNORED
        packed = any(len(sample.starts) > 1 for sample in batch)
        more = {"position_ids": positions.to(device)} if packed else {}
        head, where = self._model.get_output_embeddings(), keep.to(device)
        hidden: list[torch.Tensor] = []

        def cut(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden.append(inputs[0][where])
            return (hidden[0][:0] if self._in_pieces else hidden[0], *inputs[1:])

        hook = head.register_forward_pre_hook(cut)
        try:
            with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
                # Padding is on the right and attention is causal: no learnt token can see it.
                logits = self._model(input_ids=ids.to(device), use_cache=False, **more).logits
        finally:
            hook.remove()
        wanted = targets[keep].to(device)
        if self._in_pieces:
            losses = self._of_hidden(hidden[0].to(head.weight.dtype), head.weight, wanted)
        else:
            losses = self._of_logits(logits, wanted)
        return losses, keep.nonzero()[:, 0]

    def _padding_free(self, body: Body, batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with all rows behind one another in one sequence."""
        ids = torch.tensor([token for sample in batch for token in sample.ids])
        lengths: list[int] = []
        learnt: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for index, sample in enumerate(batch):
            offset = sum(lengths)
            lengths += [end - start for start, end in pairwise([*sample.starts, len(sample.ids)])]
            for start, end in sample.spans:
                learnt.append(torch.arange(offset + start, offset + end))
                rows.append(torch.full((end - start,), index))
        where = torch.cat(learnt)
        hidden = body(ids, lengths)
        # What comes before position t predicts the token at t.
        before, targets = (
            (index.pin_memory() if hidden.is_cuda else index).to(hidden.device, non_blocking=True)
            for index in (where - 1, ids[where])
        )
        weight = self._model.get_output_embeddings().weight
        chosen = hidden.index_select(0, before).to(weight.dtype)
        return self._of_hidden(chosen, weight, targets), torch.cat(rows)

    def _of_hidden(self, hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = TokenLoss.apply(hidden, weight, wanted)
        return losses

    def _of_logits(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), wanted, reduction="none")

    def sums(self, batch: list[Sample], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(log probability, learnt tokens) of each row's answers."""
        losses, rows = self(batch, device)
        rows = rows.to(losses.device)
        zero = torch.zeros(len(batch), device=losses.device)
        return zero.index_add(0, rows, -losses), zero.index_add(0, rows, torch.ones_like(losses))


class Accuracy(LossHead):
    """The share of each row's learnt tokens that are the most probable ones, in place of a loss.

    Its mean over rows is LLaMA-Factory's eval_accuracy. head: computes the logits.
    """

    def __init__(self, head: LossHead) -> None:
        self.__dict__.update(head.__dict__)

    def weight(self, batch: list[Sample]) -> float:
        return len(batch)

    def __call__(self, batch: list[Sample], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        hits, rows = super().__call__(batch, device)
        rows = rows.to(hits.device)
        zero = torch.zeros(len(batch), device=hits.device)
        counts = zero.index_add(0, rows, torch.ones_like(hits))
        return zero.index_add(0, rows, hits) / counts, torch.arange(len(batch))

    def _of_hidden(self, hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        pieces = hidden.split(loss_rows(len(hidden), hidden.shape[1], len(weight)))
        return (torch.cat([(piece @ weight.T).argmax(-1) for piece in pieces]) == wanted).float()

    def _of_logits(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(-1) == wanted).float()


class Preference:
    """DPO (arXiv:2305.18290) and the losses that LLaMA-Factory has beside it, by `pref_loss`.

    sigmoid with `dpo_label_smoothing`; hinge (arXiv:2305.10425); ipo (arXiv:2310.12036, by the mean over
    tokens); kto_pair (arXiv:2402.01306, over pairs); orpo (arXiv:2403.07691) and simpo (arXiv:2405.14734),
    which need no reference. `pref_ftx` adds the plain loss of the chosen answers.
    """

    zero_is_bad = False

    def __init__(
        self, head: LossHead, config: TrainConfig, reference: dict[int, tuple[float, float]]
    ) -> None:
        self._head, self._config, self._reference = head, config, reference

    def weight(self, batch: list[Pair]) -> float:
        return len(batch)

    def __call__(self, batch: list[Pair], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        answers = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        sums, lengths = self._head.sums(answers, device)
        (chosen, rejected), (long, short) = sums.chunk(2), lengths.chunk(2)
        config, beta = self._config, self._config.pref_beta
        plain = -chosen / long
        if config.pref_loss == "orpo":
            good, bad = chosen / long, rejected / short
            margin = (good - bad) - (_log1mexp(good) - _log1mexp(bad))
            losses = plain - beta * functional.logsigmoid(margin)
        elif config.pref_loss == "simpo":
            margin = chosen / long - rejected / short
            losses = -functional.logsigmoid(beta * margin - config.simpo_gamma)
        else:
            before = torch.tensor([self._reference[id(pair)] for pair in batch], device=chosen.device)
            up, down = chosen - before[:, 0], rejected - before[:, 1]
            if config.pref_loss == "ipo":
                margin = up / long - down / short
                losses = (margin - 1 / (2 * beta)) ** 2
            elif config.pref_loss == "kto_pair":
                # Each against the mean of the other side's batch, as KTO's estimate of the divergence.
                over, under = up.mean().clamp(min=0), down.mean().clamp(min=0)
                losses = 1 - (torch.sigmoid(beta * (up - under)) + torch.sigmoid(beta * (over - down))) / 2
            else:
                margin = up - down
                losses = _smoothed(beta * margin, config)
        if config.pref_ftx:
            losses = losses + config.pref_ftx * plain
        return losses, torch.arange(len(batch))


def _smoothed(margin: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    if config.pref_loss == "hinge":
        return functional.relu(1 - margin)
    wrong = config.dpo_label_smoothing
    return -(1 - wrong) * functional.logsigmoid(margin) - wrong * functional.logsigmoid(-margin)


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) for value < 0, exact near 0."""
    return torch.log(-torch.expm1(value.clamp(max=-1e-7)))


class Feedback:
    """KTO (arXiv:2402.01306, equation 7), from answers that are good or not, by themselves.

    loss = weight * (1 - sigmoid(beta * (r - z))) of a good answer, (z - r) of a bad one, where r is how much
    more likely the answer became. z, how far the model moved at all, is the mean of the same over a batch's
    questions with other rows' answers, at least 0 and without a gradient. `pref_ftx` adds the plain loss of
    the good answers.
    """

    zero_is_bad = False

    def __init__(
        self, head: LossHead, config: TrainConfig, reference: dict[int, tuple[float, float]]
    ) -> None:
        self._head, self._config, self._reference = head, config, reference

    def weight(self, batch: list[Judged]) -> float:
        return len(batch)

    def __call__(self, batch: list[Judged], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        with torch.no_grad():
            moved, _ = self._head.sums([item.other for item in batch], device)
        sums, lengths = self._head.sums([item.answer for item in batch], device)
        before = torch.tensor([self._reference[id(item)] for item in batch], device=sums.device)
        good = torch.tensor([item.good for item in batch], device=sums.device)
        gain = (sums - before[:, 0]) - (moved - before[:, 1]).mean().clamp(min=0)
        weights = torch.where(good, config.kto_chosen_weight, config.kto_rejected_weight)
        losses = weights * (1 - torch.sigmoid(config.pref_beta * torch.where(good, gain, -gain)))
        if config.pref_ftx:
            losses = losses + config.pref_ftx * good * (-sums / lengths)
        return losses, torch.arange(len(batch))


def reference(
    head: LossHead, items: Sequence[Pair | Judged], device: str, size: int
) -> dict[int, tuple[float, float]]:
    """Log probabilities of the answers in both parts of each item, by its id(). The model: in eval mode.

    Before training, a fresh adapter changes nothing: the model that is to be trained is its own reference.
    """
    logs: dict[int, tuple[float, float]] = {}
    with torch.no_grad():
        for batch in by_length(items, size):
            sums, _ = head.sums([part for item in batch for part in item.parts], device)
            for item, (first, second) in zip(batch, sums.float().view(-1, 2).tolist(), strict=True):
                logs[id(item)] = (first, second)
    return logs


def by_length(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Batches of at most `size` items of like length."""
    order = sorted(items, key=lambda item: item.size)
    for start in range(0, len(order), size):
        yield order[start : start + size]
