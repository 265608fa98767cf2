"""The images of deploy/, built and used: a training, an export, answers over HTTP, and what is refused.

    sudo python -m tests.container_images FOLDER

Needs root, buildah and debootstrap, and no registry: the base is made by debootstrap. Containers run in
chroots (buildah's chroot isolation), so their network is this machine's: a port that compose.yaml would map
is asked as it is. Where a Docker daemon answers, compose.yaml is started too, by `tests.container_compose`.
pip's settings are this machine's, mounted while packages are installed; TORCH_INDEX_URL is as in deploy/.env.
It takes half an hour on two cores and 15 GB in FOLDER, which is removed at the end: no suite runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from edge.machine.hardware import free_port
from tests import container_compose
from tests.support.containers import QUESTION, START_A_JOB, ask, say, train_and_export, write_run

SOURCES = Path(__file__).parents[1]
BASE = "localhost/edge-test-base"
LIMITS = {"serve": 1.5e9, "ui": 6e9}
# Neither the one that builds an image nor root, as EDGE_UID may say.
USER = 4321
KEY = "a-key-of-the-test"
COMPILERS = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|clang|cc1|cc1plus|as|ld|cmake|ninja|nvcc)(-?[\d.]+)?")
FOLDERS = {name: f"/work/{name}" for name in ("models", "data", "runs", "jobs")} | {"cache": "/cache"}


class Buildah:
    """buildah with its storage in a folder, which is removed with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        roots = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._command = ["buildah", *roots, "--storage-driver", "vfs"]
        self._env = os.environ | {"TMPDIR": str(folder / "tmp")}

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self._command, *words], env=self._env, text=True, **options)

    def __call__(self, *words: str) -> str:
        with self.start(*words, stdout=subprocess.PIPE) as process:
            text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"buildah {words[0]} failed: exit code {process.returncode}")
        return text.strip()


def make_base(buildah: Buildah) -> None:
    """A minimal Debian as an image."""
    root = buildah.folder / "base"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(root), "/")
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)
    shutil.rmtree(root)


def pip_mounts(folder: Path) -> list[str]:
    """Options that show this machine's pip settings, and the folders that they name, to the build."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    rows = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", done.stdout, re.MULTILINE)
    settings = {name: value for name, value in rows if name != "index-url"}
    mounts = {}
    if certificates := settings.pop("cert", ""):
        settings["cert"] = "/run/certificates.crt"
        mounts[certificates] = settings["cert"]
    for value in settings.values():
        for word in value.split():
            # The pages of an index name files beside its folder.
            path = Path(word.removeprefix("file://"))
            path = path.parent if word.startswith("file://") else path
            if path.is_absolute() and path.exists():
                mounts[str(path)] = str(path)
    lines = [f"{name} = {value}" for name, value in settings.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    mounts[str(folder / "pip.conf")] = "/etc/pip.conf"
    options = [option for source, target in mounts.items() for option in ("-v", f"{source}:{target}:ro")]
    indexes = {
        "PIP_INDEX_URL": dict(rows).get("index-url"),
        "TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL"),
    }
    for name, value in indexes.items():
        options += ["--build-arg", f"{name}={value}"] if value else []
    return options


def build(buildah: Buildah, target: str) -> None:
    """Build one image, and check what it holds."""
    options = ["--isolation", "chroot", "--build-arg", f"BASE={BASE}", *pip_mounts(buildah.folder)]
    options += ["--target", target, "-t", f"localhost/edge-{target}"]
    options += ["-f", str(SOURCES / "deploy" / "Dockerfile"), str(SOURCES)]
    start = time.monotonic()
    with buildah.start("bud", *options) as process:
        process.wait()
    if process.returncode:
        raise SystemExit(f"{target} was not built, as the lines above say")
    say(f"{target}: built in {time.monotonic() - start:.0f} s")
    image = json.loads(buildah("inspect", "--type", "image", f"localhost/edge-{target}"))
    layers = [layer["size"] for layer in json.loads(image["Manifest"])["layers"]]
    say(
        f"{target}: {sum(layers) / 1e6:,.0f} MB, by layer "
        + " + ".join(f"{size / 1e6:,.0f}" for size in layers)
    )
    assert sum(layers) < LIMITS[target], f"{target} is over {LIMITS[target] / 1e9} GB"
    config = image["OCIv1"]["config"]
    assert config["User"] == "1000:0", config["User"]
    assert list(config["ExposedPorts"]) == [{"serve": "8000/tcp", "ui": "7860/tcp"}[target]]
    assert "PIP_INDEX_URL" not in " ".join(config["Env"])


class Container:
    """A container of an image, with folders of this machine as its volumes."""

    def __init__(self, buildah: Buildah, target: str, volumes: Path) -> None:
        self._buildah, self.volumes = buildah, volumes
        self.name = buildah("from", f"localhost/edge-{target}")
        self.root = Path(buildah("mount", self.name))
        for name in FOLDERS:
            (volumes / name).mkdir(parents=True, exist_ok=True)
            os.chown(volumes / name, USER, 0)

    def start(
        self, *words: str, key: str = KEY, program: str = "edge-entrypoint", **popen: Any
    ) -> subprocess.Popen[str]:
        """The image's entry point with these words, as compose.yaml starts it, or another program."""
        options = ["--isolation", "chroot", "--user", f"{USER}:0", "--env", f"EDGE_API_KEY={key}"]
        for name, path in FOLDERS.items():
            options += ["-v", f"{self.volumes / name}:{path}"]
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | popen
        return self._buildah.start("run", *options, self.name, "--", program, *words, **popen)

    def run(self, *words: str, code: int = 0, **options: Any) -> str:
        """What the command prints; its exit code must be `code`. options: of `start`."""
        with self.start(*words, **options) as process:
            text, _ = process.communicate()
        assert process.returncode == code, f"{words}: exit code {process.returncode}\n{text}"
        return text

    @contextlib.contextmanager
    def serving(self, port: int, *words: str) -> Iterator[Path]:
        """A server of the container, while it runs; its log."""
        log = self.volumes.parent / f"{words[0]}.log"
        with log.open("w", encoding="utf-8") as out:
            process = self.start(*words, "--port", str(port), stdout=out)
        try:
            deadline = time.monotonic() + 120
            while ask(port, "/health")[0] == 0:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.5)
            yield log
        finally:
            inside = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if not child.cmdline()[0].startswith("buildah")
            ]
            # The first of the container is told, and no other.
            min(inside, key=lambda child: child.create_time()).terminate()
            process.wait(timeout=60)


def check_processes(port: int) -> None:
    """Nobody of the server is root, and nothing but the port is open to others."""
    [owner] = {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    server = psutil.Process(owner)
    for process in (server, *server.children(recursive=True)):
        assert USER in process.uids() and 0 not in process.uids(), process
        listening = [c.laddr for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert all(address.port == port or address.ip == "127.0.0.1" for address in listening), listening


def check_contents(container: Container) -> None:
    found = [
        path
        for path in container.root.rglob("*")
        if COMPILERS.fullmatch(path.name) and path.is_file() and os.access(path, os.X_OK)
    ]
    assert not found, f"a compiler is in the image: {found}"
    packages = next((container.root / "opt/edge/lib").glob("python*/site-packages"))
    sizes = {
        path.name: sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        for path in packages.iterdir()
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    say("   largest packages, MB: " + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in largest))


def check_refusals(container: Container, target: str) -> None:
    """What is missing is named in a sentence; nothing is started."""
    words = {"serve": ("serve", "runs/run", "--wait"), "ui": ("ui",)}[target]
    text = container.run(*words, "--host", "0.0.0.0", code=2, key="")
    assert "needs an API key" in text and "Traceback" not in text, text
    cache = container.volumes / "cache"
    os.chown(cache, 0, 0)
    cache.chmod(0o755)
    text = container.run(*words, "--host", "0.0.0.0", code=1)
    assert f"/cache cannot be written by the container's user {USER}" in text and "EDGE_UID" in text, text
    os.chown(cache, USER, 0)


def check_serving(container: Container, ui: Container) -> None:
    """A server that waits, a step of training and an export beside it, and then answers."""
    port = free_port()
    with container.serving(port, "serve", "runs/run", "--wait", "--host", "0.0.0.0") as log:
        assert json.loads(ask(port, "/health")[1])["status"] == "waiting"
        assert container.run("health", str(port)) == ""
        assert ask(port, "/v1/models", key=KEY)[0] == 503 and ask(port, "/v1/models")[0] == 401
        text = container.run("serve", "runs/run", "--wait", "--host", "0.0.0.0", "--port", str(port), code=1)
        assert "cannot be used" in text and "Traceback" not in text, text
        train(ui)
        deadline = time.monotonic() + 120
        while ask(port, "/ready", key=KEY)[0] != 200:
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(1)
        status, answer = ask(port, "/v1/chat/completions", QUESTION, key=KEY)
        assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] > 0, answer
        check_processes(port)
        say(f"   asked at its own port, for a chroot has this machine's network: {answer[:60]}...")
        say("   " + log.read_text(encoding="utf-8").strip().replace("\n", "\n   "))


def train(ui: Container) -> None:
    """One step, merged and exported, by the commands that a user types."""
    write_run(ui.volumes)
    for path in ui.volumes.rglob("*"):
        os.chown(path, USER, 0, follow_symlinks=False)
    train_and_export(ui.run)
    owners = {path.stat().st_uid for path in (ui.volumes / "runs").rglob("*")}
    assert owners == {USER}, owners


def check_doctor(container: Container) -> None:
    report = json.loads(container.run("doctor", "--json"))
    rows = [row for row in report["items"] if row["group"] == "llama.cpp"]
    assert rows and not any(row["todo"] for row in rows), rows
    assert any("built for any" in row["found"] for row in rows), rows
    say("   doctor: " + "; ".join(row["found"] for row in rows))


def check_page(container: Container) -> None:
    """The page asks for its key, and what it has started is told when it ends."""
    port, job = free_port(), container.volumes / "jobs" / "0001"
    with container.serving(port, "ui", "--host", "0.0.0.0"):
        assert ask(port, "/")[0] == 401
        status, page = ask(port, "/", key=KEY)
        assert status == 200 and "<html" in page, page[:200]
        assert container.run("health", str(port)) == ""
        check_processes(port)
        container.run("-c", START_A_JOB, program="python")
        assert not (job / "stop").exists()
    assert (job / "stop").exists() and json.loads((job / "state.json").read_text())["exit_code"] != 0
    container.run("health", str(port), code=1)


def check_memory(container: Container) -> None:
    """The limit of a cgroup, which is this machine's here, is what plans are made within."""
    limit, root = 400 * 2**20, Path("/sys/fs/cgroup")
    version1 = (root / "memory").is_dir()
    group = (root / "memory" if version1 else root) / "edge-image-test"
    try:
        group.mkdir()
        name = "memory.limit_in_bytes" if version1 else "memory.max"
        (group / name).write_text(str(limit), encoding="utf-8")
    except OSError as error:
        say(f"   memory: not tried, {error}")
        return
    try:
        text = container.run(
            "doctor", "--json", preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
        )
        assert json.loads(text)["machine"]["memory_total"] == limit, text
    finally:
        group.rmdir()


def check_compose(buildah: Buildah) -> None:
    """compose.yaml with these images, where a Docker daemon can start it."""
    if not container_compose.daemon():
        say("compose.yaml: not started, for no Docker daemon answers")
        return
    try:
        for target, name in container_compose.IMAGES.items():
            buildah("push", "--quiet", f"localhost/edge-{target}", f"docker-daemon:{name}:latest")
        container_compose.check(buildah.folder / "compose")
    finally:
        for name in container_compose.IMAGES.values():
            subprocess.run(["docker", "rmi", name], capture_output=True, check=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder.absolute()
    if folder.exists():
        parser.error(f"{folder} is there already, and would be removed at the end: give another one")
    buildah = Buildah(folder)
    containers: dict[str, Container] = {}
    try:
        make_base(buildah)
        for target in LIMITS:
            build(buildah, target)
            containers[target] = Container(buildah, target, folder / "volumes")
            check_contents(containers[target])
        for target, container in containers.items():
            check_refusals(container, target)
            check_doctor(container)
            check_memory(container)
        check_serving(containers["serve"], containers["ui"])
        check_page(containers["ui"])
        check_compose(buildah)
    finally:
        for container in containers.values():
            buildah("rm", container.name)
        shutil.rmtree(folder)
    say("all of it holds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
