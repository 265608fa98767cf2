"""From logits to a token: one sampler for every backend, exact, without a Python loop over the vocabulary.

Order of operations, as in transformers: logit bias and penalties, temperature, top_k, top_p, min_p, draw.
One uniform number is drawn for each token from the request's own generator, so that a seed gives the same
text whatever else runs in the batch, as far as the backend's logits do not depend on the batch.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Candidates, Logits, StepOutputs

Mask = NDArray[np.bool_]

# A vocabulary is looked at in this many interleaved groups, so that numpy works on whole rows of them.
_GROUPS = 64
# Below this temperature the best token is certain to single precision; dividing by it could overflow.
_GREEDY = 1e-4
# Nucleus sampling sorts this many of the best candidates; a flatter distribution is cut without sorting.
_PROBE = 128
# From so many logits in a step on, sampling takes long enough to be worth several threads; the second is for
# greedy rows, which are quicker.
PARALLEL_FROM, PARALLEL_GREEDY_FROM = 2**20, 2**22
_THREADS = 4


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is to be sampled and when it ends. Values are checked where requests come in.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. logprobs: None, or the number of
    alternatives to report beside each token. max_tokens None: until the context is full.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: list[str] = []
    stop_ids: list[int] = []

    def with_seed(self, i: int) -> Params:
        """For the `i`th of several answers: another seed, where one was given."""
        if self.seed is None or i == 0:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + i) % 2**63)


@dataclass(slots=True)
class Choice:
    """A sampled token; with logprobs asked, its natural-log probability and the best alternatives."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Sampler:
    """One request's sampling state. `pick` is called once for each token, in order."""

    def __init__(self, params: Params, vocab: int, prompt: list[int], stop_ids: frozenset[int]) -> None:
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        self._stop_set = stop_ids
        self._stops = np.fromiter(sorted(stop_ids), np.int64, len(stop_ids))
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self._penalised = bool(
            params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        )
        # repetition looks at prompt and answer (transformers), presence and frequency at the answer (OpenAI).
        self._seen = np.zeros(vocab if self._penalised else 0, bool)
        self._counts = np.zeros(vocab if self._penalised else 0, np.int32)
        if self._penalised:
            self._seen[np.asarray(prompt, np.int64)] = True
        changed = self._penalised or len(self._bias_ids) or params.logprobs is not None
        # Only the largest logit matters, and whether it is a stop.
        self.greedy = params.temperature < _GREEDY and not changed
        # How many of the largest logits decide the next token; the whole vocabulary where any one may.
        few = 1 if self.greedy else params.top_k
        held = len(self._stops) if params.ignore_eos or params.min_tokens else 0
        self.reach = vocab if changed or not few else few + held
        self._count = 0

    @property
    def holds_back_stops(self) -> bool:
        """Whether the next token may not be a stop id."""
        return self.params.ignore_eos or self._count < self.params.min_tokens

    def pick(self, output: Logits | Candidates, mask: Mask | None = None) -> Choice:
        """Choose a token. output: logits [vocab], which may be written into, or, without a mask, candidates,
        of which there must be `reach`. mask: [vocab], True where allowed.
        """
        if isinstance(output, Candidates):
            choice = Choice(self._among(output))
        elif self.greedy and mask is None:
            return self.pick_best(int(output.argmax()), output)
        else:
            choice = self._from_logits(output, mask)
        self._count += 1
        if self._penalised:
            self._seen[choice.token] = True
            self._counts[choice.token] += 1
        return choice

    def pick_best(self, token: int, logits: Logits) -> Choice:
        """As `pick` where `greedy`: `token` has the largest of `logits`, which may be written into."""
        if token in self._stop_set and self.holds_back_stops:
            logits[self._stops] = -np.inf
            token = int(logits.argmax())
        self._count += 1
        return Choice(token)

    def _among(self, candidates: Candidates) -> int:
        ids, logits = candidates.ids, candidates.logits
        if self.holds_back_stops:
            # A Python loop over so few is quicker than numpy.
            allowed = [i for i, token in enumerate(ids.tolist()) if token not in self._stop_set]
            ids, logits = ids[allowed], logits[allowed]
        if self.params.temperature < _GREEDY:
            return int(ids[0])
        return self._draw_top(ids[: self.params.top_k], logits[: self.params.top_k])

    def _from_logits(self, logits: Logits, mask: Mask | None) -> Choice:
        params = self.params
        if params.logprobs is not None:
            raw = logits.astype(np.float64)
            norm = raw.max()
            norm += math.log(np.exp(raw - norm).sum())
        self._adjust(logits)
        if mask is not None:
            logits[~mask] = -np.inf
        if self.holds_back_stops and len(self._stops):
            # A grammar that is complete leaves nothing but a stop: then it may come.
            kept = logits[self._stops]
            logits[self._stops] = -np.inf
            if mask is not None and logits.max() == -np.inf:
                logits[self._stops] = kept
        token = int(logits.argmax()) if params.temperature < _GREEDY else self._draw(logits)
        if params.logprobs is None:
            return Choice(token)
        top: list[tuple[int, float]] = []
        if params.logprobs:
            best = np.argpartition(-raw, params.logprobs - 1)[: params.logprobs]
            best = best[np.argsort(-raw[best], kind="stable")]
            top = [(int(i), float(raw[i] - norm)) for i in best]
        return Choice(token, float(raw[token] - norm), top)

    def _adjust(self, logits: NDArray[np.float32]) -> None:
        params = self.params
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if not self._penalised:
            return
        if params.repetition_penalty != 1.0:
            seen = np.flatnonzero(self._seen)
            values = logits[seen]
            # Keskar et al. 2019 (CTRL), in the form that transformers gives it.
            logits[seen] = np.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.presence_penalty or params.frequency_penalty:
            used = np.flatnonzero(self._counts)
            logits[used] -= params.presence_penalty + params.frequency_penalty * self._counts[used]

    def _draw(self, logits: NDArray[np.float32]) -> int:
        params = self.params
        if 0 < params.top_k < len(logits):
            ids = _top(logits, params.top_k)
            return self._draw_top(ids, logits[ids])
        weights = np.exp((logits - logits.max()) * np.float32(1.0 / params.temperature))
        if params.top_p < 1.0:
            goal = params.top_p * float(weights.sum(dtype=np.float64))
            ids = _top(logits, _PROBE)
            probed = weights[ids].astype(np.float64)
            if probed.sum() >= goal:
                return self._draw_weighted(ids, probed, goal)
            cut_to_nucleus(weights, goal)
        if params.min_p > 0.0:
            weights[weights < params.min_p] = 0.0
        return self._draw_from_all(weights)

    def _draw_top(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> int:
        """Draw from the largest logits, the largest first, which are all that may come."""
        weights = np.exp((logits - logits[0]).astype(np.float64) / self.params.temperature)
        return self._draw_weighted(ids, weights, self.params.top_p * float(weights.sum()))

    def _draw_weighted(self, ids: NDArray[np.int64], weights: NDArray[np.float64], goal: float) -> int:
        """Draw from `ids` with falling `weights`, of which the first to reach the sum `goal` may come."""
        params = self.params
        count = _nucleus(weights, goal)
        ids, weights = ids[:count], weights[:count]
        if params.min_p > 0.0:
            # The best token's weight is 1.
            likely = weights >= params.min_p
            ids, weights = ids[likely], weights[likely]
        # By id, so that the number drawn means the same token whichever way the cut was made.
        order = np.argsort(ids)
        edges = np.cumsum(weights[order])
        place = int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))
        return int(ids[order[min(place, len(ids) - 1)]])

    def _draw_from_all(self, weights: NDArray[np.float32]) -> int:
        """Draw by weight without sorting: first a group of tokens, then a token of it."""
        width = -(-len(weights) // _GROUPS)
        padded = np.zeros(width * _GROUPS, np.float32)
        padded[: len(weights)] = weights
        grid = padded.reshape(_GROUPS, width)
        edges = np.cumsum(grid.sum(axis=1, dtype=np.float64))
        goal = self._rng.random() * edges[-1]
        group = min(int(np.searchsorted(edges, goal, side="right")), _GROUPS - 1)
        inner = np.cumsum(grid[group], dtype=np.float64)
        goal -= edges[group - 1] if group else 0.0
        # Rounding must never choose a token of weight 0.
        place = int(np.searchsorted(inner, min(goal, inner[-1] * (1 - 1e-15)), side="right"))
        return group * width + min(place, width - 1)


class BatchSampler:
    """Samples the rows of a step together, where that is faster than one by one.

    parallel: CPU cores are idle while rows are sampled, so that wide steps use a pool of threads.
    """

    def __init__(self, *, parallel: bool) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "sample") if parallel else None

    def pick(self, outputs: StepOutputs, rows: list[tuple[Sampler, int]]) -> dict[int, Choice]:
        """What each sampler picks from outputs[index], without masks, by index; {} where it does not pay."""
        if not rows or not isinstance(outputs, np.ndarray):
            return {}
        pool = self._pool if outputs.size >= PARALLEL_FROM else None
        if all(sampler.greedy for sampler, _ in rows):
            # Threads meet at Python's lock: each gets rows for one call, where those take longer than that.
            if pool is not None and outputs.size >= PARALLEL_GREEDY_FROM:
                best = [*itertools.chain.from_iterable(pool.map(_largest, np.array_split(outputs, _THREADS)))]
            else:
                best = _largest(outputs)
            return {index: sampler.pick_best(best[index], outputs[index]) for sampler, index in rows}
        if pool is None:
            return {}

        def pick(part: list[tuple[Sampler, int]]) -> list[tuple[int, Choice]]:
            return [(index, sampler.pick(outputs[index])) for sampler, index in part]

        shares = [rows[start::_THREADS] for start in range(_THREADS)]
        return dict(itertools.chain.from_iterable(pool.map(pick, shares)))


def _largest(logits: Logits) -> list[int]:
    """The id of the largest logit of each row."""
    return [int(token) for token in logits.argmax(axis=1)]


def _top(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the `k` largest logits (those of -inf left out), largest first, equal ones by id."""
    width = len(logits) // _GROUPS
    floor = np.float32(-np.inf)
    if 0 < k < width:
        # The k-th largest of the groups' maxima is no larger than the k-th largest logit.
        maxima = logits[: width * _GROUPS].reshape(_GROUPS, width).max(axis=0)
        # Where few are left (a mask, candidates alone), most groups hold nothing, and sorting equals is slow.
        maxima = maxima[maxima > floor]
        if len(maxima) >= k:
            floor = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    ids = np.flatnonzero(logits > floor if floor == -np.inf else logits >= floor)
    values = logits[ids]
    if len(ids) > k:
        edge = np.partition(values, len(values) - k)[len(values) - k]
        above, level = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
        few = np.sort(np.concatenate([above, level[: k - len(above)]]))
        ids, values = ids[few], values[few]
    order = np.argsort(-values, kind="stable")
    order = order[: np.searchsorted(-values[order], np.inf)]
    return ids[order]


def _nucleus(weights: NDArray[np.float64], goal: float) -> int:
    """How many of the sorted weights it takes to reach `goal` (top_p's share; Holtzman et al. 2020)."""
    return int(np.searchsorted(np.cumsum(weights), goal, side="left")) + 1


def cut_to_nucleus(weights: NDArray[np.float32], goal: float) -> None:
    """Set to 0, in place, all but the fewest, largest weights (of [0, 1]) that sum to `goal`.

    Not all are sorted: non-negative floats are ordered as their bits are, so a histogram of the upper bits
    tells in which bin the cut lies, and only that bin is sorted.
    """
    bins = weights.view(np.int32) >> 16
    sums = np.bincount(bins, weights=weights)
    above = np.cumsum(sums[::-1])[::-1]
    cut = max(int(np.searchsorted(-above, -goal, side="right")) - 1, 0)
    edge = np.flatnonzero(bins == cut)
    edge = edge[np.argsort(-weights[edge], kind="stable")]
    count = _nucleus(weights[edge].astype(np.float64), goal - float(above[cut] - sums[cut]))
    weights[bins < cut] = 0.0
    weights[edge[count:]] = 0.0
