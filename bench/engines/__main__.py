"""Engines side by side on this machine: one program, one table, interleaved rounds.

    python -m bench.engines MODEL.gguf                 our server, a bare llama.cpp loop, reference servers
    python -m bench.engines MODEL.gguf --only streams --streams 1,8,16 --peers llama-server,openvino --busy
    python -m bench.engines RUN --backend onnx         our engine, onnxruntime-genai's Generator, transformers
    python -m bench.engines RUN/gguf RUN/onnx --merged RUN/merged --gpu [--report docs/reports/serve-GPU]
    python -m bench.engines RUN/onnx --gpu --only http --streams 1,8,32,128 [--beside vllm=http://127.0.0.1:8000]
    python -m bench.engines MODEL.gguf --gpu --only small-gpu --caps 6,8
    python -m bench.engines MODEL.gguf --only bare --streams 1,8 --kv-unified on,off --flash-attention on,off

All sides make the same forced number of greedy tokens, without speculation. Against servers ours is a server
too, with the same threads and flash attention; against libraries it is the engine without HTTP. The last line
on standard output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engines import bare_llamacpp, features, race, sides, small_gpu
from bench.engines.race import Case, Rates, Row, Side
from bench.measure.load import get_json
from bench.measure.process_probe import noise
from bench.measure.workloads import counts
from bench.servers import external
from bench.servers.address import name_and_url
from bench.servers.reference_servers import llama_cpp_server, llama_server, openvino_command, xllamacpp
from bench.servers.target import Running, Target, ours, started
from edge.artefact import find, manifest
from edge.backends import onnx
from edge.backends.base import Backend
from edge.console import guarded, plain_table
from edge.engine.worker import Load, open_backend
from edge.errors import UnavailableError, UsageError
from edge.loading import load_plan
from edge.machine import hardware

TOKENS, CONTEXT, LONG_CONTEXT = 64, 512, 4096
# Of each client, where requests join and leave.
ANSWERS = 3
# Bytes of weights between the two sizes of model that the goals are for, 135M and 1.5B.
_LARGE = 400_000_000
_PACKAGES = (
    "edge", "llama-cpp-python", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
    "onnxruntime-genai-cuda", "torch", "transformers",
)  # fmt: skip
# What our server is set beside.
BARE, LLAMA_SERVER, OPENVINO = "bare", "llama-server", "openvino"
PEERS = (BARE, LLAMA_SERVER, OPENVINO, "xllamacpp", "llama_cpp.server")
Rows = Generator[Row, None, None]


@dataclasses.dataclass
class Bench:
    """One artefact to measure, the command's options, and the samples of all cases so far."""

    artefact: find.Artefact
    options: argparse.Namespace
    logs: Path
    console: Console
    samples: dict[str, Any]
    settings: dict[str, Any]
    transformers: Sequence[Side] = ()

    def race(self, case: Case) -> Generator[Row, None, dict[str, list[Rates]]]:
        """Yield the rows of a case; returns its samples."""
        seed = len(self.samples)
        rates = race.race(case, rounds=self.options.rounds, console=self.console, seed=seed)
        self.samples[case.name] = {
            name: [vars(result) for result in results] for name, results in rates.items()
        }
        yield from race.rows(case, rates)
        return rates

    def edge(self, *words: str) -> contextlib.AbstractContextManager[Running]:
        """Our server over the artefact."""
        target = ours(self.artefact.path, "--threads", str(self.options.threads), *words)
        return started(target, self.logs / "edge.log", watch=False)


def streams(bench: Bench) -> Rows:
    """Our server beside what `--peers` names; with `--busy` again while another program uses a core."""
    path, options = bench.artefact.path, bench.options
    slots = max(options.streams)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(bench.edge("--slots", str(slots), "--ctx", str(CONTEXT)))
        settings = asyncio.run(get_json(server.url, "/info"))["settings"]
        bench.settings[path.name] = settings
        flash = settings["flash_attention"] == "on"
        measured: list[Side] = [sides.Server(server)]
        if BARE in options.peers:
            model = stack.enter_context(contextlib.closing(bare_llamacpp.Model(path)))
            unified = settings["kv"] == "unified"
            measured.append(bare_llamacpp.BareLoop(model, options.threads, flash, unified))
        if LLAMA_SERVER in options.peers:
            target = llama_server(
                path, slots=slots, context=CONTEXT, threads=options.threads, flash_attention=flash
            )
            other = started(target, bench.logs / "llama-server.log", watch=False)
            measured.append(sides.Server(stack.enter_context(other)))
        if OPENVINO in options.peers:
            openvino = stack.enter_context(sides.OpenVINO(openvino_command(path, options.threads)))
            bench.settings[openvino.name] = {"version": openvino.version}
            measured.append(openvino)
        yield from streams_of(bench, measured)
        if options.busy:
            with busy_core():
                yield from streams_of(bench, measured, ", a busy core")


def streams_of(bench: Bench, measured: Sequence[Side], beside: str = "") -> Rows:
    """The rows of `streams`. beside: what else goes on meanwhile."""
    options, header = bench.options, bench.artefact.header
    # The longer a step, the less of it is HTTP.
    alone = 0.95 if header.weights_bytes > _LARGE else 0.85
    total: dict[int, float] = {}
    for count in sorted(options.streams):
        quiet = 1.2 if count == 1 else 1.4 if count <= 8 else 1.5
        goals = {LLAMA_SERVER: 2.0 if beside else quiet, sides.OpenVINO.name: 1.5}
        goals |= {bare_llamacpp.BareLoop.name: alone} if count == 1 else {}
        tokens = (options.tokens or TOKENS,) * count
        name = f"{count} streams{beside}"
        case = Case(name, tokens, "total", measured, header.vocab_size, options.prompt, goals)
        rates = yield from bench.race(case)
        total[count] = statistics.median(result.total for result in rates["edge"])
        if count > 8 in total:
            growth = total[count] / total[8]
            yield Row(f"{name} against 8", f"{growth:.2f} x", goal="not lower", reached=growth >= 0.97)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another program that computes without a pause."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def servers(bench: Bench) -> Rows:
    """Eight streams against the servers that come as Python packages, as far as `--peers` names them."""
    path, threads, peers = bench.artefact.path, bench.options.threads, bench.options.peers
    targets: list[tuple[float, Target]] = []
    if "xllamacpp" in peers:
        targets.append((1.5, xllamacpp(path, slots=8, context=CONTEXT, threads=threads)))
    if "llama_cpp.server" in peers:
        targets.append((6.0, llama_cpp_server(path, context=CONTEXT, threads=threads)))
    for goal, target in targets:
        with (
            bench.edge("--slots", "8", "--ctx", str(CONTEXT)) as server,
            started(target, bench.logs / f"{target.name}.log", watch=False) as other,
        ):
            pair = (sides.Server(server), sides.Server(other))
            name = f"8 streams, beside {target.name}"
            yield from bench.race(Case(name, (TOKENS,) * 8, "total", pair, 1000, goals={target.name: goal}))


def ours_alone(bench: Bench) -> Rows:
    """What only our server has to show."""
    context = min(LONG_CONTEXT, bench.artefact.header.context_length)
    with bench.edge("--ctx", str(context)) as server:
        options = bench.options
        yield from features.rows(server, context, rounds=options.rounds, requests=options.requests)


def bare(bench: Bench) -> Rows:
    """The bare llama.cpp loop alone, in each setting."""
    options = bench.options
    with contextlib.closing(bare_llamacpp.Model(bench.artefact.path, gpu=options.gpu)) as model:
        words = {True: "on", False: "off"}
        loops = [
            bare_llamacpp.BareLoop(
                model, options.threads, flash, unified, options.ctx, memory=not options.gpu,
                name=f"unified KV cache {words[unified]}, flash attention {words[flash]}",
            )
            for unified, flash in itertools.product(options.kv_unified, options.flash_attention)
        ]  # fmt: skip
        for count in options.streams:
            tokens = (options.tokens or TOKENS,) * count
            yield from bench.race(
                Case(f"{count} streams", tokens, "decode", loops, model.vocab, options.prompt)
            )


@dataclasses.dataclass(frozen=True)
class Size:
    """How much the engines are asked, and how many times faster ours should be.

    unequal: lengths of answers that join and leave; many: against the other loop with all streams;
    alone, together: against transformers with one stream and with all.
    """

    tokens: int
    streams: int
    unequal: tuple[int, ...]
    alone: float
    together: float
    many: float | None = None


CPU = Size(64, 8, (16, 32, 48, 64, 64, 80, 96, 112), alone=3.5, together=10.0)
GPU = Size(256, 32, tuple(128 + 256 * n // 31 for n in range(32)), alone=10.0, together=100.0, many=1.0)


def cases(
    name: str, pair: tuple[Side, Side], size: Size, *, slow: Sequence[Side], plain: Sequence[Side], vocab: int
) -> list[Case]:
    """What is measured of one artefact. pair: ours and another loop over the same file.

    slow: transformers; plain: ours without captured CUDA graphs, where there are any.
    """
    other = pair[1].name
    library = other == sides.Generator.name
    one, equal = (size.tokens,), (size.tokens,) * size.streams
    many = {other: size.many} if size.many else {}
    slow_names = [side.name for side in slow]
    limits = dict.fromkeys(slow_names, 2 if size is CPU else 1)

    def case(what: str, tokens: tuple[int, ...], more: Sequence[Side], goals: Mapping[str, float]) -> Case:
        rate = what.split()[0].rstrip(",")
        limited = limits if len(tokens) > 1 else {}
        return Case(f"{name}: {what}", tokens, rate, [*pair, *more], vocab, goals=goals, limits=limited)

    result = [
        case("decode, 1 stream", one, plain, {other: 0.97 if library else 0.95}),
        case("total, 1 stream", one, slow, dict.fromkeys(slow_names, size.alone)),
        case(f"decode, {size.streams} streams", equal, plain, many),
        case(f"total, {size.streams} streams", equal, slow, dict.fromkeys(slow_names, size.together) | many),
    ]
    if not library:
        result.append(case("decode, 8 streams", (size.tokens,) * 8, plain, {other: 0.95}))
    else:
        # The Generator's batch runs until its longest answer ends.
        what = f"total, {size.streams} streams, joining and leaving"
        result.append(case(what, size.unequal, slow, {other: 1.0}))
    return result


def libraries(bench: Bench) -> Rows:
    """Our engine beside a library's own loop over the same file, and beside transformers; no HTTP."""
    artefact, options = bench.artefact, bench.options
    size = GPU if options.gpu else CPU
    with contextlib.ExitStack() as stack:

        def engine(name: str = "edge", *, graphs: bool = True) -> tuple[Side, Backend]:
            backend = open_ours(artefact, options, size.streams, graphs=graphs)
            stack.callback(backend.close)
            return sides.Ours(backend, name), backend

        mine, backend = engine()
        info = backend.info
        bench.settings[artefact.path.name] = {"device": info.device, **info.settings}
        plain: list[Side] = []
        other: Side
        if artefact.kind == "onnx":
            other = sides.Generator(artefact.path.parent, options.threads)
            if options.gpu:
                plain = [engine("edge without CUDA graphs", graphs=False)[0]]
            else:
                # Between ours, so that neither side has the earlier ones.
                second = sides.Generator(artefact.path.parent, options.threads)
                mine, other = sides.Pair(mine, engine()[0]), sides.Pair(other, second)
        else:
            model = stack.enter_context(
                contextlib.closing(bare_llamacpp.Model(artefact.path, gpu=options.gpu))
            )
            unified, flash = info.settings["kv"] == "unified", info.settings["flash_attention"] == "on"
            other = bare_llamacpp.BareLoop(model, int(info.settings["threads"]), flash, unified)
        for case in cases(
            artefact.path.name, (mine, other), size, slow=bench.transformers, plain=plain, vocab=info.vocab
        ):
            yield from bench.race(case)


def http(bench: Bench) -> Rows:
    """Our server beside our engine without HTTP, or beside the servers of `--beside`: clients that ask for
    answer after answer.
    """
    options, slots = bench.options, max(bench.options.streams)
    device = "cuda" if options.gpu else "cpu"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            bench.edge("--slots", str(slots), "--ctx", str(CONTEXT), "--device", device)
        )
        info = asyncio.run(get_json(server.url, "/info"))
        bench.settings[bench.artefact.path.name] = {"device": info["device"], **info["settings"]}
        # On a processor they would take from what is measured.
        askers = None
        if options.gpu:
            spawn = multiprocessing.get_context("spawn")
            askers = stack.enter_context(ProcessPoolExecutor(sides.ASKERS, spawn))
        others = [
            stack.enter_context(started(external.target(*given), bench.logs / "none"))
            for given in options.beside
        ]
        for other in others:
            bench.settings[other.target.name] = external.told(other.target)
        backend = None if others else open_ours(bench.artefact, options, slots)
        if backend is not None:
            stack.callback(backend.close)
        for count in options.streams:
            measured: list[Side] = [sides.Server(one, count, askers) for one in (server, *others)]
            goals = {}
            if backend is not None:
                measured.append(sides.Ours(backend, "edge without HTTP", count))
                goals = {measured[-1].name: 0.9}
            tokens = (options.tokens or TOKENS,) * (ANSWERS * count)
            case = Case(
                f"{count} clients, {ANSWERS} answers each", tokens, "total", measured,
                bench.artefact.header.vocab_size, options.prompt, goals=goals,
            )  # fmt: skip
            yield from bench.race(case)
    if options.gpu and not others:
        with bench.edge("--ctx", str(LONG_CONTEXT), "--device", device) as server:
            yield features.long_prompt(server, streams=16, tokens=2000, rounds=options.rounds)


def open_ours(
    artefact: find.Artefact, options: argparse.Namespace, streams: int, *, graphs: bool = True
) -> Backend:
    """As the server would load it, but for a context of the length that is needed here.

    Raises UnavailableError where it does not run on the GPU that was asked for.
    """
    device = "cuda" if options.gpu else "cpu"
    threads = None if options.gpu else options.threads
    asked = load_plan.Options(context=CONTEXT, slots=streams, threads=threads, device=device)
    settings = load_plan.plan(artefact, asked).settings
    if isinstance(settings, onnx.Settings):
        settings = dataclasses.replace(settings, cuda_graphs=graphs)
    backend = open_backend(Load.of(artefact, settings, tune=True))
    if not backend.info.device.startswith(device):
        raise UnavailableError(f"{artefact.path} runs on {backend.info.device}: {backend.info.why}")
    return backend


def capped(bench: Bench) -> Rows:
    """Our server with little of a GPU's memory free, beside llama-server."""
    options = bench.options
    yield from small_gpu.rows(
        bench.artefact, options.caps, bench.logs, bench.console,
        tokens=options.tokens or TOKENS, rounds=options.rounds,
    )  # fmt: skip


PARTS = {
    "streams": streams, "servers": servers, "features": ours_alone, "libraries": libraries, "http": http,
    "bare": bare, "small-gpu": capped,
}  # fmt: skip


def switches(text: str) -> list[bool]:
    """`"on,off"` -> [True, False]. Raises UsageError for other words."""
    words = text.split(",")
    if not set(words) <= {"on", "off"}:
        raise UsageError(f"'{text}' is none of on, off and on,off")
    return [word == "on" for word in words]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.splitlines()[0])
    options.add_argument(
        "paths", type=Path, nargs="+", help="runs, folders with a GGUF or ONNX model, or files"
    )
    options.add_argument("--backend", choices=tuple(find.SUFFIXES), help="of a run: which artefact")
    options.add_argument("--gpu", action="store_true", help="on the GPU; by default without HTTP")
    options.add_argument("--only", choices=tuple(PARTS), help="one part of the table")
    options.add_argument("--merged", type=Path, help="for transformers (default: that of a run)")
    options.add_argument("--streams", default="1,8,16,32", help="default: %(default)s")
    options.add_argument("--prompt", type=int, default=100, help="tokens of a prompt (default: %(default)s)")
    options.add_argument("--tokens", type=int, help=f"tokens of an answer (default: {TOKENS})")
    options.add_argument("--rounds", type=int, default=5, help="of each comparison (default: %(default)s)")
    options.add_argument("--threads", type=int, default=hardware.cpu_threads())
    options.add_argument(
        "--peers",
        default=",".join(peer for peer in PEERS if peer != OPENVINO),
        help=f"some of {', '.join(PEERS)} (default: %(default)s)",
    )
    options.add_argument(
        "--busy", action="store_true", help="streams: again while another program uses a core"
    )
    options.add_argument("--requests", type=int, default=1000, help="of the memory test; 0 leaves it out")
    options.add_argument(
        "--beside", action="append", default=[], metavar="NAME=URL",
        help="http: a server that runs already and speaks OpenAI's completions, in place of our engine alone",
    )  # fmt: skip
    options.add_argument("--flash-attention", default="off", help="bare: on, off or on,off")
    options.add_argument("--kv-unified", default="on", help="bare: on, off or on,off")
    options.add_argument("--ctx", type=int, default=0, help="bare: KV cells (default: what the streams need)")
    options.add_argument("--caps", default="6,8", help="small-gpu: GiB that are free (default: %(default)s)")
    options.add_argument("--report", type=Path, help="write this path with .json and .md")
    return options


def parts_of(artefact: find.Artefact, options: argparse.Namespace) -> list[str]:
    if options.only:
        return [options.only]
    if options.gpu or artefact.kind == "onnx":
        return ["libraries"]
    return ["streams", "servers", "features"]


def load_transformers(options: argparse.Namespace, console: Console) -> list[Side]:
    """transformers in the types that it is measured in; none without the merged model."""
    merged = options.merged or options.paths[0] / "merged"
    if not merged.is_dir():
        console.print(f"{merged} is not there: transformers is left out")
        return []
    device, threads, most = ("cuda", 4, 2) if options.gpu else ("cpu", options.threads, 64)
    return [
        sides.Transformers(merged, dtype=dtype, device=device, threads=threads, most=most)
        for dtype in (("bfloat16", "float32") if options.gpu else ("float32",))
    ]


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    options.streams, options.caps = counts(options.streams), counts(options.caps)
    options.flash_attention, options.kv_unified = map(switches, (options.flash_attention, options.kv_unified))
    options.peers = options.peers.split(",")
    if unknown := set(options.peers) - set(PEERS):
        raise UsageError(f"--peers {', '.join(sorted(unknown))}: the names are {', '.join(PEERS)}")
    options.beside = [name_and_url(given, "--beside") for given in options.beside]
    for name in ("prompt", "threads", "rounds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1")
    artefacts = [find.resolve(path, options.backend) for path in options.paths]
    parts = {artefact.path: parts_of(artefact, options) for artefact in artefacts}
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    before = noise()
    table: list[Row] = []
    samples: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    # What transformers makes does not depend on our artefact: it is measured beside the first one.
    with_slow = next((artefact for artefact in artefacts if "libraries" in parts[artefact.path]), None)
    with tempfile.TemporaryDirectory() as logs:
        for artefact in artefacts:
            slow = load_transformers(options, console) if artefact is with_slow else []
            bench = Bench(artefact, options, Path(logs), console, samples, settings, slow)
            for row in itertools.chain.from_iterable(PARTS[part](bench) for part in parts[artefact.path]):
                table.append(row)
                # Said at once, so that a later failure does not lose it.
                console.print("  ".join(row.cells()))
    warnings = [reading.warning for reading in (before, noise()) if reading.warning]
    show(table, samples, settings, warnings, options)
    return 0


def show(
    table: Sequence[Row],
    samples: Mapping[str, Any],
    settings: Mapping[str, Any],
    warnings: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """The table and the JSON line on standard output, and the report's files."""
    machine, versions = hardware.describe(), manifest.versions(*_PACKAGES)
    names = ", ".join(path.name for path in options.paths)
    processor = hardware.gpus()[0].name if options.gpu else hardware.processor(machine)
    threads = "" if options.gpu else f"{options.threads} threads, "
    about = (
        f"{names}; {processor}; {threads}{options.rounds} rounds, prompts of {options.prompt} tokens; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )
    facts = {
        "about": about,
        "machine": machine,
        "versions": versions,
        "settings": settings,
        "rows": [dataclasses.asdict(row) for row in table],
        "samples": samples,
        "warnings": warnings,
    }
    if options.report:
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        # Not with_suffix: a report's name may end in 1.5B.
        written = {".json": text, ".md": race.markdown(table, about)}
        for suffix, content in written.items():
            Path(f"{options.report}{suffix}").write_text(content, encoding="utf-8")
    console = Console()
    console.print(plain_table(race.HEADINGS, [row.cells() for row in table], title=about, left=5))
    for warning in warnings:
        console.print(f"warning: {warning}: the machine is noisy, ratios are what counts")
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
