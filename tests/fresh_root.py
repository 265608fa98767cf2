"""The README's two commands in a Debian that has nothing but what the README asks for: times by stage.

    sudo python3 tests/fresh_root.py FOLDER [--command "make demo"]... [--bind PATH]...

Makes FOLDER/root by debootstrap, installs the packages that README.md names, copies the last commit into it
and runs the commands there (by default both). Every line of theirs is printed with the time since its command
began, and the terminal as it stood after 30 s, 2 and 5 minutes is repeated at the end. pip's settings and
proxies, and what --bind names (a mirror on this machine), are those outside. It takes an hour on two cores:
no suite runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCES = Path(__file__).parents[1]
SNAPSHOTS_S = (30, 120, 300)
SHOWN = 20
# What begins a stage: of the setup, of its build, and of the demo, whose running stage stands in brackets.
STAGE = re.compile(r"^\[\d+/\d+\] ([^:]+)|^(llama\.cpp: building)|> \[([^]]+)\]|^\[([a-z]+)\] >")


def prerequisites() -> list[str]:
    """The Debian packages of README.md."""
    readme = (SOURCES / "README.md").read_text(encoding="utf-8")
    names = re.search(r"sudo apt-get install\s+([^`]+)`", readme)
    if names is None:
        raise SystemExit("README.md names no packages")
    return names[1].split()


def run_timed(command: list[str]) -> tuple[int, list[tuple[float, str]]]:
    """Run it and print each line with its time; the exit code, and seconds and text of each line."""
    start, lines = time.monotonic(), list[tuple[float, str]]()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - start, line.rstrip("\n")))
            sys.stdout.write(f"{clock(lines[-1][0])} {line}")
            sys.stdout.flush()
    lines.append((time.monotonic() - start, f"exit code {process.returncode}"))
    return process.returncode, lines


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
    environment = [f"HOME={Path.home()}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *passed]
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
        code, lines = run_timed(inside(root, line))
        summary += [f"== {line}: exit code {code}, {clock(lines[-1][0]).strip()}"]
        summary += [f"   {clock(seconds)}  {name}" for name, seconds in stages(lines)]
        for moment in SNAPSHOTS_S if line not in steps else ():
            shown = [text for second, text in lines if second <= moment][-SHOWN:]
            summary += [f"-- the terminal after {moment} s", *(f"   {text}" for text in shown)]
        if code != 0:
            break
    sys.stdout.write("\n".join(["", *summary, ""]))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
