"""The README's two commands in a Debian that has nothing but what the README asks for: times by stage.

    sudo python3 tests/fresh_root.py FOLDER [--command "make demo"]... [--bind PATH]...

Makes FOLDER/root by debootstrap, installs the packages that README.md names, copies the last commit into it
and runs the commands there (by default both), each in a terminal of its own. Every line of theirs is printed
with the time since its command began; the terminal as it stood after 30 s, 2 and 5 minutes goes into files
beside the root, with what was written to it (tmux reads that). pip's settings and proxies, and what --bind
names (a mirror on this machine), are those outside. It takes an hour on two cores: no suite runs it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

SOURCES = Path(__file__).parents[1]
SNAPSHOTS_S = (30, 120, 300)
ROWS, COLUMNS = 40, 110
# What begins a stage: of the setup, and of the demo, whose running stage stands in brackets.
STAGE = re.compile(r"^\[\d+/\d+\] ([^:]+)|> \[([a-z ]+)\]|^\[([a-z ]+)\] >")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def prerequisites() -> list[str]:
    """The Debian packages of README.md."""
    readme = (SOURCES / "README.md").read_text(encoding="utf-8")
    names = re.search(r"sudo apt-get install\s+([^`]+)`", readme)
    if names is None:
        raise SystemExit("README.md names no packages")
    return names[1].split()


def run_timed(command: list[str]) -> tuple[int, list[tuple[float, bytes]]]:
    """Run it in a terminal and print each line with its time; the exit code, and what was written when."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    start, written, rest = time.monotonic(), list[tuple[float, bytes]](), b""
    while data := read(terminal):
        written.append((time.monotonic() - start, data))
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            sys.stdout.write(f"{clock(written[-1][0])} {plain(line)}\n")
        sys.stdout.flush()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    written.append((time.monotonic() - start, b""))
    return code, written


def read(terminal: int) -> bytes:
    """What comes next from a terminal; nothing once its program has ended."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def plain(line: bytes) -> str:
    """What is left to see of a line: the last that was written over it, without colours."""
    text = CONTROL.sub("", line.decode("utf-8", "replace")).rstrip("\r")
    return text.rpartition("\r")[2].rstrip()


def timed_lines(written: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """Seconds and text of each line, and the last moment."""
    lines, rest = list[tuple[float, str]](), b""
    for second, data in written:
        *ended, rest = (rest + data).split(b"\n")
        lines += [(second, plain(line)) for line in ended]
    return [*lines, (written[-1][0], plain(rest))]


def screen(written: list[tuple[float, bytes]], second: float, file: Path) -> None:
    """Keep in `file` the terminal as it stood at `second`, by tmux; what was written to it lies beside."""
    raw = file.with_suffix(".raw")
    raw.write_bytes(b"".join(data for moment, data in written if moment <= second))
    # A server of its own for each picture: one that has been told to end may still hold its socket.
    tmux = ["tmux", "-L", f"fresh-root-{os.getpid()}-{file.stem}"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    show = f"cat {shlex.quote(str(raw))}; exec sleep 60"
    subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", *size, show], check=True)
    time.sleep(1.0)
    shown = subprocess.run([*tmux, "capture-pane", "-p"], check=True, capture_output=True).stdout
    subprocess.run([*tmux, "kill-server"], check=True)
    file.write_bytes(shown.rstrip() + b"\n")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:3}:{int(seconds) % 60:02}"


def stages(lines: list[tuple[float, str]]) -> list[tuple[str, float]]:
    """Name and seconds of each stage that the lines show."""
    marks = [(0.0, "start")]
    for second, line in lines:
        if match := STAGE.search(line):
            marks.append((second, next(filter(None, match.groups()))))
    ends = [second for second, _ in marks[1:]] + [lines[-1][0]]
    return [(name, end - begin) for (begin, name), end in zip(marks, ends, strict=True)]


def make_root(root: Path, binds: list[Path]) -> None:
    """A minimal Debian with the prerequisites and the sources in /src. Needs root."""
    if not (root / "etc").is_dir():
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    for path in (Path("/dev"), *binds):
        inside = root / path.relative_to("/")
        inside.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", str(path), str(inside)], check=True)
    shutil.rmtree(root / "src", ignore_errors=True)
    (root / "src").mkdir()
    archive = subprocess.run(["git", "-C", str(SOURCES), "archive", "HEAD"], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(root / "src")], input=archive.stdout, check=True)


def copy_settings(root: Path) -> None:
    """The network's, pip's and the trusted certificates of this machine, which packages bring anew."""
    files = [Path.home() / ".config/pip/pip.conf"]
    files += map(
        Path, ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
    )
    for file in filter(Path.is_file, files):
        target = root / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def inside(root: Path, line: str) -> list[str]:
    """The command that runs a shell's line in /src of the root, with a bare environment."""
    passed = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name == "SSL_CERT_FILE"
    ]
    environment = [
        f"HOME={Path.home()}",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG=C.UTF-8",
        "TERM=screen",
        *passed,
    ]
    return ["chroot", str(root), "env", "-i", *environment, "sh", "-c", f"cd /src && {line}"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", action="append", help="instead of `make demo` and `make test`")
    parser.add_argument("--bind", action="append", type=Path, default=[], help="a folder that is seen inside")
    args = parser.parse_args(argv)
    if "FRESH_ROOT_MOUNTS" not in os.environ:
        # Mounts of its own, which end with it.
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, __file__, *argv]
        return subprocess.run(own, check=False, env={**os.environ, "FRESH_ROOT_MOUNTS": "1"}).returncode
    root = args.folder.absolute() / "root"
    args.folder.mkdir(parents=True, exist_ok=True)
    make_root(root, args.bind)
    packages = " ".join(prerequisites())
    steps = [f"apt-get update && apt-get install -y --no-install-recommends {packages}"]
    summary = []
    for line in [*steps, *(args.command or ["make demo", "make test"])]:
        copy_settings(root)
        sys.stdout.write(f"== {line}\n")
        code, written = run_timed(inside(root, line))
        lines = timed_lines(written)
        summary += [f"== {line}: exit code {code}, {clock(lines[-1][0]).strip()}"]
        summary += [f"   {clock(seconds)}  {name}" for name, seconds in stages(lines)]
        for moment in SNAPSHOTS_S if line not in steps and lines[-1][0] > SNAPSHOTS_S[0] else ():
            file = args.folder / f"{re.sub(r'[^a-z]+', '-', line)}-{moment}s.txt"
            screen(written, moment, file)
            summary += [f"   the terminal after {moment} s: {file}"]
        if code != 0:
            break
    sys.stdout.write("\n".join(["", *summary, ""]))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
