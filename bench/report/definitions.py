"""What each figure of a report means. The report prints this; docs/benchmarks.md has the same words."""

from __future__ import annotations

from bench.measure.metrics import OBJECTIVE

DEFINITIONS: dict[str, str] = {
    "first token (TTFT)": (
        "from sending the request to the first piece of text that is not empty; of a server that "
        "does not stream, to the whole answer"
    ),
    "between tokens (ITL)": (
        "the gap between two pieces of text of one answer, as the reader sees it; a piece may hold "
        "several tokens"
    ),
    "per token (TPOT)": (
        "from the first piece of text to the last, over the tokens after the first piece; where a "
        "server does not say how many tokens a piece has, they are spread evenly"
    ),
    "whole answer (E2E)": ("from sending the request to the end of the answer"),
    "output tokens/s": (
        "output tokens of all clients' whole answers over the time from a round's first request to "
        "its last end; median of the rounds"
    ),
    "total tokens/s": ("the same with the prompts' tokens"),
    "requests/s": ("whole answers over the same time"),
    "goodput": (
        f"requests/s of those whose first token came within {OBJECTIVE.ttft:g} s and whose TPOT was "
        f"at most {OBJECTIVE.tpot:g} s; in brackets their share of all"
    ),
    "requests/s within the objective": (
        "the most goodput of a sweep: requests arrive at random times (Poisson), half as many again "
        "at each step, until fewer than nine in ten meet the objective"
    ),
    "p50, p90, p95, p99": (
        "percentiles over the whole answers of all rounds, with the 95 % interval by bootstrap "
        "(2000 draws, fewer of thousands of values)"
    ),
    "better by": (
        "the geometric mean of the rounds' ratios, each between neighbours in time, with the "
        "smallest and the largest; withheld where the two did not do the same work"
    ),
    "incomplete, failed": (
        "answers with another number of tokens than was asked for, and those that ended with an "
        "error; both are counted apart and enter no figure"
    ),
    "memory": (
        "of the whole process tree, shared pages counted once (PSS, or USS where there is none): "
        "median while serving, and the most since the start"
    ),
    "processor time a token": (
        "seconds of all processors that the server's process tree used, over its output tokens"
    ),
    "GPU memory": "what all GPUs held more with the warm server than before it started",
    "from start to first answer, to ready": (
        "from starting the process until its port answered anything, and until it could be asked: "
        "libraries, weights and, for edge, tuning the first time"
    ),
    "`/health` meanwhile": (
        "asked every 0.1 s during the load, whether or not the last question was answered"
    ),
    "of what the memory allows": (
        "decoding of one client (1 / TPOT; of a server that does not stream, tokens over the whole "
        "answer) over the best read bandwidth of the processor's or the GPU's memory (a processor's is "
        "measured right before and right after each round, with a kernel that only reads, at the weights' "
        "size and with as many threads as decode; median of the rounds), divided by the bytes that one "
        "token reads: all weights once, of an embedding that is not the head as well one row, and the "
        "context's keys and values"
    ),
    "KL divergence": (
        "of the next token's distribution from the merged model's in float32, mean over positions, "
        "in nats; from the comparison that export and `edge verify` write into edge.json"
    ),
    "same top token": ("the share of those positions whose most probable token is the merged model's"),
    "perplexity": ("exp of the mean negative log likelihood of the data set's answers, where it was at hand"),
}
