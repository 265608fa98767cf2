"""Installs what edge needs: `python -m edge.setup`. The standard library is enough to run it.

In the source tree that goes into `.venv` there; from a wheel, or in an environment that has edge, into the
Python that runs it. What was chosen stays for the next time, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edge import child_process
from edge.errors import EdgeError, UnavailableError, UsageError

# The name on a package index. The command and the import are `edge`.
DISTRIBUTION = "edge-tune"
PINS = Path(__file__).with_name("constraints.txt")
PIP = "26.1"
# Extra -> megabytes that its packages take to download, those of earlier lines left out.
EXTRAS = {
    "serve": 5,
    "onnx": 32,
    "ui": 20,
    "train": 320,
    "modelscope": 4,
    "export-onnx": 40,
    "bench": 1,
    "ray": 100,
    "dev": 28,
}
# `all` leaves Ray out: some systems have no wheel of it, and of all others, such as Macs with Intel's chips.
ALL = tuple(name for name in EXTRAS if name != "ray")
BASE_MB = 22
# The libraries of CUDA, where torch is built for it.
CUDA_MB = 2500
# A downloaded megabyte takes so many on the disk, pip's cache included.
UNPACKED = 5
NATIVE = ("serve", "train", "bench")  # the extras that use llama.cpp
# What builds llama.cpp; its version is pinned.
BUILD_TOOLS, BUILD_TOOLS_MB = ("scikit-build-core", "cmake", "ninja"), 31
# The index has only the CPU's torch for Windows.
TORCH_INDEX = "https://download.pytorch.org/whl/"
_STATE = "edge-setup.json"
# The exit code of edge.machine.build_llamacpp where there is neither a compiler nor a stock build.
NO_LLAMACPP = 3
# Seconds between two looks at what is under way, and what pip gets to put things in order after Ctrl-C.
_TICK_S, _END_S = 0.5, 5.0


@dataclass(frozen=True)
class Machine:
    """What the steps depend on. system: sys.platform. cuda: the newest CUDA of the NVIDIA driver, or "".

    python: where packages go. tree: the source tree, None for an installed wheel. torch: "", "cpu" or "cuda".
    """

    system: str
    cuda: str
    python: str
    tree: str | None
    torch: str = ""


@dataclass(frozen=True)
class Choice:
    extras: tuple[str, ...] = ALL
    cuda: bool = False
    build: bool = True


@dataclass(frozen=True)
class Step:
    """One command. megabytes: about what it downloads; 0 for one that shows its own progress.

    ahead: it runs beside the steps that follow, and only makes a later one shorter.
    """

    title: str
    command: list[str]
    megabytes: int = 0
    ahead: bool = False


# How edge is installed


def source_tree() -> Path | None:
    """The folder of the sources that run; None for an installed wheel."""
    tree = Path(__file__).resolve().parent.parent
    return tree if (tree / "pyproject.toml").is_file() else None


def shell(words: list[str]) -> str:
    """The words as one line for this system's shell."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def this_python() -> str:
    """The running Python as a word of a command: `python` where that is it, else its path."""
    found = shutil.which("python")
    if found and Path(found) == Path(sys.executable):
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def install_command(*extras: str) -> str:
    """The command that adds these extras to the edge that runs."""
    return shell([this_python(), "-m", "edge.setup", "--extras", ",".join(extras)])


def pip_command(*words: str) -> str:
    """The command of this Python's pip."""
    return shell([this_python(), "-m", "pip", *words])


def requirements(*extras: str, own: bool = False) -> list[str]:
    """What the installed distribution declares to need, and for the extras; `own`: for them alone.

    Raises UnavailableError where edge is not installed.
    """
    from importlib import metadata

    try:
        rows = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise UnavailableError(f"{DISTRIBUTION} is not installed", "python -m edge.setup") from error
    return select(rows, extras, own=own)


def own_requirements(tree: str | None) -> list[str]:
    """What edge needs without any extra, which an installed wheel has brought."""
    if tree is None:
        return []
    project = tomllib.loads((Path(tree) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def select(rows: Iterable[str], extras: Iterable[str], *, own: bool = False) -> list[str]:
    """Those of the declared requirements that the extras bring, and unless `own` those of no extra."""
    wanted = [row.split(";") for row in rows]
    names = list(extras)
    return [
        name.strip()
        for name, *marker in wanted
        if (not marker and not own)
        or any(re.search(rf"extra == ['\"]{extra}['\"]", mark) for mark in marker for extra in names)
    ]


# The machine


def torch_kind(packages: Path) -> str:
    """ "cuda" or "cpu", as the torch in `packages` was built; "" where none is."""
    try:
        text = (packages / "torch" / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    return "cuda" if re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE) else "cpu"


def driver_cuda() -> str:
    """The newest CUDA that the NVIDIA driver supports; "" without a GPU."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    version = re.search(rb"CUDA(?: UMD)? Version\s*:\s*(\d+(?:\.\d+)?)", done.stdout)
    return version[1].decode() if done.returncode == 0 and version else ""


def check_width(wide: bool) -> None:
    """Raise UnavailableError for a Python of 32 bits; one that is too old ends in edge/__init__.py."""
    if wide:
        return
    hint = {
        "win32": "winget install Python.Python.3.13, then: py -3.13 -m edge.setup",
        "darwin": "brew install python@3.13, then: python3.13 -m edge.setup",
    }.get(
        sys.platform, "Debian, Ubuntu: sudo apt-get install python3 python3-venv, then: python3 -m edge.setup"
    )
    raise UnavailableError("this Python is 32 bits wide, its packages exist for 64 bits alone", hint)


def environment(tree: Path | None) -> Path:
    """The folder of the environment that packages go into."""
    inside = list(Path(sysconfig.get_path("purelib")).glob("edge_tune-*.dist-info"))
    return Path(sys.prefix) if tree is None or inside else tree / ".venv"


def packages_of(folder: Path) -> Path:
    """Where the packages of an environment lie; `folder` itself where that is not to be found."""
    if folder == Path(sys.prefix):
        return Path(sysconfig.get_path("purelib"))
    places = [*folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages"]
    return next((place for place in places if place.is_dir()), folder)


def lacks(places: list[Path], choice: Choice) -> bool:
    """Whether something that was chosen is missing in `places`, or is not of the tested version."""
    from importlib import metadata

    own = next(iter(metadata.distributions(name=DISTRIBUTION, path=[*map(str, places)])), None)
    if own is None:
        return True
    there = {}
    for folder in (folder for place in reversed(places) for folder in place.glob("*.dist-info")):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        there[_plain(name)] = version.split("+")[0]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE))
    names = [re.split(r"[ ;<>=!~\[]", row)[0] for row in select(own.requires or [], choice.extras)]
    if choice.cuda:
        names = ["onnxruntime-gpu" if name == "onnxruntime" else name for name in names]
    if choice.build and {*NATIVE} & {*choice.extras}:
        names.append("llama-cpp-python")
    tested = {_plain(name): version for name, version in pins.items()}
    found = {_plain(name): there.get(_plain(name)) for name in names}
    return any(version != tested.get(name, version) or version is None for name, version in found.items())


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python_of(folder: Path) -> Path:
    if folder == Path(sys.prefix):
        return Path(sys.executable)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def has_pip(python: Path) -> bool:
    command = [str(python), "-m", "pip", "--version"]
    try:
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def restore_pip(folder: Path) -> bool:
    """Put the pip that Python brings along into an environment that lacks one; whether that works now."""
    python = python_of(folder)
    for record in packages_of(folder).glob("pip-*.dist-info"):
        shutil.rmtree(record, ignore_errors=True)  # it would be taken for installed
    command = [str(python), "-m", "ensurepip", "--default-pip"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=120, check=False)
    return has_pip(python)


# The steps


def plan(machine: Machine, choice: Choice, *, before: Choice | None = None) -> list[Step]:
    """What to run on `machine`, in order. before: what an earlier run chose."""
    pip = [machine.python, "-m", "pip", "--disable-pip-version-check"]
    # Python compiles what is imported, which is a small part of what is installed.
    install = [*pip, "install", "--no-compile", "-c", str(PINS)]
    steps = []
    if machine.tree:
        steps.append(Step("pip itself", [*pip, "install", "--quiet", f"pip=={PIP}"]))
    native = [machine.python, "-m", "edge.machine.build_llamacpp", *(["--cuda"] if choice.cuda else [])]
    builds = choice.build and bool({*NATIVE} & {*choice.extras})
    if builds:
        tools = [*install, *own_requirements(machine.tree), *BUILD_TOOLS]
        steps.append(Step("what builds llama.cpp", tools, BASE_MB + BUILD_TOOLS_MB))
        ahead = [*native, "--wheel", "--progress", "json"]
        steps.append(Step("llama.cpp, beside the rest", ahead, ahead=True))
    gpu = bool(machine.cuda) or choice.cuda
    runtime = bool({"onnx", "export-onnx"} & {*choice.extras})
    torch = bool({"train", "bench"} & {*choice.extras})
    if torch and gpu and machine.system == "win32" and machine.torch != "cuda":
        # A driver before CUDA 13 runs what was built for any CUDA 12.
        tag = "cu126" if machine.cuda and int(machine.cuda.split(".")[0]) < 13 else "cu130"
        again = ["--force-reinstall"] if machine.torch else []
        command = [*install, *again, "--no-deps", "--index-url", TORCH_INDEX + tag, "torch"]
        steps.append(Step("PyTorch for the GPU", command, CUDA_MB))
    both = [*pip, "uninstall", "--quiet", "--yes", "onnxruntime", "onnxruntime-gpu"]
    if runtime and before and before.cuda and not choice.cuda:
        steps.append(Step("ONNX Runtime for the GPU is removed", both))
    size = sum(EXTRAS[extra] for extra in choice.extras) + (0 if builds else BASE_MB)
    if machine.tree:
        packages = ["-e", f"{machine.tree}[{','.join(choice.extras)}]"]
    else:
        packages = requirements(*choice.extras)
    steps.append(Step("packages", [*install, *packages], size))
    if runtime and choice.cuda:
        # The two packages are one folder: what another package asked for goes first.
        steps.append(Step("ONNX Runtime for the CPU is removed", both))
        name = "onnxruntime-gpu" if torch else "onnxruntime-gpu[cuda,cudnn]"  # torch brings the libraries
        steps.append(Step("ONNX Runtime for the GPU", [*install, name], 300))
    if builds:
        steps.append(Step("llama.cpp", native))
    return steps


def digest(tree: Path | None, choice: Choice) -> str:
    """A key of all that decides whether what is installed is still what is wanted."""
    machine = Path(__file__).parent / "machine"
    files = [
        PINS,
        *(machine / f"{name}_llamacpp.py" for name in ("build", "stock")),
        *(machine / name for name in ("llamacpp_source.py", "build_check.py")),
    ]
    files += sorted(path for path in (Path(__file__).parent / "csrc").iterdir() if path.is_file())
    if tree:
        files.append(tree / "pyproject.toml")
    library = os.environ.get("LLAMA_CPP_LIB_PATH", "")
    total = hashlib.sha256(json.dumps([asdict(choice), library]).encode("utf-8"))
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()


# Progress


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def bar(done: float, total: float) -> str:
    """Twenty characters, which any console has."""
    full = int(20 * done / total) if total else 0
    return f"[{'#' * full}{'.' * (20 - full)}]"


class Ahead:
    """The build of llama.cpp beside pip's steps: its process, and how far it is."""

    def __init__(self, command: list[str], tree: str | None) -> None:
        self.done = self.total = 0
        self.left: float | None = None
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the step that needs the build says what went wrong
            cwd=tree,
            **child_process.APART,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in map(json.loads, lines):
                if line.get("total"):
                    self.done, self.total, self.left = line["done"], line["total"], line["seconds_left"]

    def status(self) -> str:
        """How far it is; "" before it compiles and after it."""
        if not self.total or self.process.poll() is not None:
            return ""
        left = f", {clock(self.left)} left" if self.left is not None else ""
        return f"llama.cpp {bar(self.done, self.total)} {self.done} of {self.total}{left}"

    def wait(self) -> None:
        """Show how far it is until it has ended."""
        meter = Meter(0, self)
        while self.process.poll() is None:
            meter.show()
            time.sleep(_TICK_S)
        meter.clear()

    def stop(self) -> None:
        """End it, and all that it has started. What is compiled stays for the next time."""
        if self.process.poll() is None:
            if sys.platform == "win32":
                command = ["taskkill", "/F", "/T", "/PID", str(self.process.pid)]
                subprocess.run(command, capture_output=True, check=False)
            else:
                os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
        self._reader.join()


class Meter:
    """What pip downloads, a line a package; and a status: what is left to come, and of a build beside it."""

    def __init__(self, megabytes: int, ahead: Ahead | None = None) -> None:
        self.expected = megabytes * 1e6
        self.done = 0.0
        self.tail: list[str] = []
        self._current, self._cuda = 0.0, False
        self._start = self._last = time.monotonic()
        self._shown, self._unpacking = 0, ""
        self._ahead = ahead

    def line(self, text: str) -> None:
        """Take one line of pip's output, with `--progress-bar raw`."""
        if match := re.match(r"Progress (\d+) of (\d+)", text):
            self._current = float(match[1])
            if self._current and self._current == float(match[2]):
                self.done, self._current = self.done + self._current, 0.0
            self.show()
            return
        self.tail = [*self.tail[-40:], text]
        if text.startswith("Collecting nvidia-") and not self._cuda:
            self._cuda = True
            self.expected += CUDA_MB * 1e6
            self.say(f"  this torch brings CUDA: about {CUDA_MB:,} MB more")
        if match := re.match(r"\s*Downloading (\S+) \((.+)\)", text):
            if not match[1].endswith(".metadata"):
                self.say(f"  {match[1].split('/')[-1]} ({match[2]})")
        elif match := re.match(r"Installing collected packages: (.+)", text):
            self._unpacking = f"unpacking {len(match[1].split(','))} packages"
            self.say(f"  {self._unpacking}")

    def say(self, text: str) -> None:
        sys.stdout.write("\r" * bool(self._shown) + text.ljust(self._shown) + "\n")
        sys.stdout.flush()
        self._shown = 0

    def status(self, now: float) -> str:
        """What is downloaded and what is built, with the time left; "" where there is nothing to say."""
        got = self.done + self._current
        expected = max(self.expected, got)
        left = (now - self._start) * (expected - got) / got if got else 0.0
        rest = f", {clock(left)} left" if expected > got > 1e6 else ""
        loaded = f"{bar(got, expected)} {got / 1e6:,.0f} of about {expected / 1e6:,.0f} MB{rest}"
        parts = (self._unpacking or loaded * (got > 0), self._ahead.status() if self._ahead else "")
        return "  " + "; ".join(filter(None, parts)) if any(parts) else ""

    def show(self) -> None:
        """The status, now and then: in its place on a terminal, else as a line."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self._last < (_TICK_S if terminal else 15.0) or not (text := self.status(now)):
            return
        self._last = now
        if terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            sys.stdout.write("\r" + text.ljust(self._shown))
            sys.stdout.flush()
            self._shown = len(text)
        else:
            self.say(text)

    def clear(self) -> None:
        """Take the status off a terminal."""
        sys.stdout.write("\r" + " " * self._shown + "\r" if self._shown else "")
        sys.stdout.flush()
        self._shown = 0


# Running


def problem(log: str, again: str, place: Path) -> EdgeError:
    """What pip's output says, as one sentence and the command that mends it."""
    if re.search(r"No space left|Errno 28|not enough space", log):
        return UnavailableError(f"the disk of {place} is full", f"free some space, then: {again}")
    if "CERTIFICATE_VERIFY_FAILED" in log:
        return UnavailableError(
            "the package index's certificate is not trusted here, as behind a proxy that opens connections",
            f"name that proxy's certificate (pip config set global.cert FILE), then: {again}",
        )
    if re.search(r"resolve|ConnectionError|NewConnection|timed out|ProxyError|SSLError|Max retries", log):
        return UnavailableError(
            "the package index cannot be reached",
            f"check the network, or name a mirror (pip config set global.index-url URL), then: {again}",
        )
    missing = re.search(r"No matching distribution found for (\S+)", log)
    if missing and "from versions: none" in log:
        return UnavailableError(
            f"the package index cannot be reached, or has no {missing[1]}",
            f"check the network and the index (pip config list), then: {again}",
        )
    if missing:
        return UnavailableError(
            f"the package index has no {missing[1]} for Python {sys.version.split()[0]} on {sys.platform}",
            "another Python (3.11 to 3.13) may have one; a mirror may lack it: pip config list",
        )
    if "No module named pip" in log:
        return UnavailableError("this Python has no pip", f"{this_python()} -m ensurepip, then: {again}")
    return EdgeError("pip failed:\n" + "\n".join(log.strip().splitlines()[-12:]), f"then: {again}")


def run_pip(step: Step, again: str, place: Path, ahead: Ahead | None = None) -> None:
    """Run a step of pip and show what it downloads, and what is built beside it. Raises EdgeError."""
    command = step.command
    if step.megabytes:
        at = command.index("install") + 1
        command = [*command[:at], "--progress-bar", "raw", *command[at:]]
    meter = Meter(step.megabytes, ahead)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**env, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
        encoding="utf-8",
        errors="replace",
    )

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.put(line.rstrip())
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            try:
                line = lines.get(timeout=_TICK_S)
            except queue.Empty:
                meter.show()
                continue
            if line is None:
                break
            meter.line(line)
        process.wait()
    finally:
        stop(process)
        reader.join()
        meter.clear()
    if process.returncode != 0:
        raise problem("\n".join(meter.tail), again, place)


def stop(process: subprocess.Popen[str]) -> None:
    """End the process; one that Ctrl-C has reached too may put things in order first."""
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def sweep(packages: Path) -> None:
    """Remove what a pip that was killed has left in an environment: it takes that for installed."""
    for folder in [*packages.glob("~*"), *packages.glob("*.dist-info")]:
        if folder.name.startswith("~") or not (folder / "RECORD").is_file():
            shutil.rmtree(folder, ignore_errors=True)


def make_environment(folder: Path, again: str) -> None:
    """Make `folder` an environment with pip, anew where half of one lies there. Raises UnavailableError.

    One that lacks nothing but pip, which was stopped while it replaced itself, keeps its packages.
    """
    if has_pip(python_of(folder)) or restore_pip(folder):
        return
    sys.stdout.write(f"an environment for Python {sys.version.split()[0]}: {folder}\n")
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = done.stdout + done.stderr
    if re.search(r"No space left|Errno 28", log):
        raise problem(log, again, folder)
    raise UnavailableError(
        f"no environment could be made: {(log.strip().splitlines() or ['no reason was given'])[-1]}",
        f"Debian, Ubuntu: sudo apt-get install python3-venv, then: {again}",
    )


def read_state(folder: Path) -> tuple[Choice | None, str]:
    """What was chosen for the environment, and the digest of what was installed whole."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return Choice(tuple(state["extras"]), state["cuda"], state["build"]), state["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def write_state(folder: Path, choice: Choice, done: str) -> None:
    text = json.dumps(asdict(choice) | {"digest": done})
    (folder / _STATE).write_text(text, encoding="utf-8")


def chosen(options: argparse.Namespace, before: Choice | None) -> Choice:
    """The options over what was chosen before: extras are added. Raises UsageError."""
    names = [name.strip() for name in (options.extras or "").split(",") if name.strip()]
    wrong = [name for name in names if name not in (*EXTRAS, "all")]
    if wrong:
        raise UsageError(
            f"--extras: there is no {', '.join(wrong)}", f"there are all (without ray), {', '.join(EXTRAS)}"
        )
    if options.cuda and sys.platform == "darwin":
        raise UsageError("--cuda: no Mac of today has an NVIDIA GPU", "leave it out")
    had = before.extras if before else ()
    wanted = {*had, *names, *(ALL if "all" in names or not (names or had) else ())}
    choice = replace(before or Choice(), extras=tuple(name for name in EXTRAS if name in wanted))
    given = {name: value for name in ("cuda", "build") if (value := getattr(options, name)) is not None}
    return replace(choice, **given)


def check_space(folder: Path, steps: list[Step], again: str) -> None:
    """Raise UnavailableError where the packages of the steps do not fit."""
    need = sum(step.megabytes for step in steps) * UNPACKED * 10**6
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise UnavailableError(
            f"the disk of {there} has {free / 1e9:.2f} GB free, about {need / 1e9:.2f} are needed",
            f"free some space, then: {again}",
        )


def bring_llamacpp(step: Step, machine: Machine, choice: Choice, again: str) -> Choice:
    """Run llama.cpp's step. Where none can be had ONNX Runtime takes its place: the choice that holds then.

    Raises EdgeError.
    """
    code = subprocess.run(step.command, check=False).returncode
    if code == 0:
        return choice
    if code == 130:
        raise KeyboardInterrupt
    again = again.replace(" --build", "")
    if code != NO_LLAMACPP or choice.cuda:
        raise EdgeError(
            "llama.cpp could not be built, as the lines above say; all else is installed",
            f"mend that, then: {again}; or serve ONNX alone: {again} --no-build",
        )
    needed = {*choice.extras, "onnx", *(["export-onnx"] if "train" in choice.extras else [])}
    extras = tuple(name for name in EXTRAS if name in needed)
    missing = tuple(name for name in extras if name not in choice.extras)
    sys.stdout.write(
        "no llama.cpp for this machine: models are served by ONNX Runtime, as `edge export onnx` makes them; "
        f"when there is a compiler: {again} --build\n"
    )
    for step in plan(machine, Choice(missing, build=False)) if missing else []:
        run_pip(step, again, Path(machine.python))
    return replace(choice, extras=extras, build=False)


def run_steps(steps: list[Step], machine: Machine, choice: Choice, again: str, folder: Path) -> Choice:
    """Run the steps in order, those that are `ahead` beside the others; the choice that holds then.

    Raises EdgeError.
    """
    ahead = None
    shown = [step for step in steps if not step.ahead]
    try:
        for step in steps:
            if step.ahead:
                ahead = Ahead(step.command, machine.tree)
                continue
            size = f": about {step.megabytes:,} MB, less what pip has kept" if step.megabytes else ""
            sys.stdout.write(f"[{shown.index(step) + 1}/{len(shown)}] {step.title}{size}\n")
            sys.stdout.flush()
            if step.title != "llama.cpp":
                run_pip(step, again, folder, ahead)
                continue
            if ahead:
                ahead.wait()
            choice = bring_llamacpp(step, machine, choice, again)
    finally:
        if ahead:
            ahead.stop()
    return choice


def setup(options: argparse.Namespace, again: str) -> None:
    """Install what the options ask for. Raises EdgeError."""
    tree = source_tree()
    folder = environment(tree)
    before, installed = read_state(folder)
    choice = chosen(options, before)
    wanted = digest(tree, choice)
    packages = packages_of(folder)
    places = [*map(Path, sys.path)] if folder == Path(sys.prefix) else [packages]
    if installed == wanted and python_of(folder).exists() and not lacks(places, choice):
        return
    python = str(python_of(folder))
    machine = Machine(sys.platform, driver_cuda(), python, str(tree) if tree else None, torch_kind(packages))
    steps = plan(machine, choice, before=before)
    if not installed:
        check_space(folder, steps, again)
    if tree:
        make_environment(folder, again)
    if tree and folder == tree / ".venv":
        sweep(packages_of(folder))
    write_state(folder, choice, "")
    start = time.monotonic()
    choice = run_steps(steps, machine, choice, again, folder)
    write_state(folder, choice, digest(tree, choice))
    command = folder / ("Scripts/edge.exe" if sys.platform == "win32" else "bin/edge")
    sys.stdout.write(
        f"installed in {clock(time.monotonic() - start)}; now: {shell([str(command), 'doctor'])}\n"
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m edge.setup", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--extras", help=f"what to add, by commas: all (default at first), {', '.join(EXTRAS)}"
    )
    toggle = argparse.BooleanOptionalAction
    parser.add_argument("--cuda", action=toggle, help="llama.cpp and ONNX Runtime for an NVIDIA GPU")
    parser.add_argument("--build", action=toggle, help="build llama.cpp (default: yes, where extras use it)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    again = shell([this_python(), "-m", "edge.setup", *argv])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a folder's name that this console cannot show
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        check_width(sys.maxsize > 2**32)
        setup(arguments(argv), again)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped by Ctrl-C; this goes on where it stopped: {again}\n")
        return 130
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'setup'}: {error.strerror}\n  then: {again}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
