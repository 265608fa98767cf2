"""deploy/compose.yaml under a Docker daemon, with images that it has: what chroots do not show.

Page and server are asked through the ports that compose maps to this machine, with named volumes, health
checks and memory limits of their own; a run is trained, exported, reloaded, and too large for its limit.
`tests.container_images` builds the images, loads them as IMAGES and calls this; containers and volumes are
removed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge.machine.hardware import free_port
from tests.support.containers import QUESTION, START_A_JOB, ask, say, train_and_export, write_run

DEPLOY = Path(__file__).parents[1] / "deploy"
PROJECT = "edge-image-test"
SERVICES = ("ui", "serve")
# Names that no user's own images have.
IMAGES = {service: f"{PROJECT}-{service}" for service in SERVICES}


def daemon() -> bool:
    """Whether a Docker daemon answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


class Compose:
    """A copy of deploy/ with a key and free ports, and the project that is started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "deploy"
        shutil.copytree(DEPLOY, self.folder, ignore=shutil.ignore_patterns(".env"))
        for name in ("compose.yaml", "compose.gpu.yaml"):
            text = (self.folder / name).read_text(encoding="utf-8")
            for service, image in IMAGES.items():
                text = re.sub(rf"image: edge-{service}\b", f"image: {image}", text)
            (self.folder / name).write_text(text, encoding="utf-8")
        subprocess.run(["sh", str(self.folder / "init")], check=True, stdout=subprocess.DEVNULL)
        self.ports = {service: free_port() for service in SERVICES}
        self.set(
            COMPOSE_PROJECT_NAME=PROJECT,
            EDGE_UI_PORT=self.ports["ui"],
            EDGE_SERVE_PORT=self.ports["serve"],
            EDGE_RUN="runs/run",
        )
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        self._command = ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]

    def set(self, **settings: object) -> None:
        """Change lines of .env, as a user does."""
        file = self.folder / ".env"
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.partition("=")[0] not in settings]
        lines = [*kept, *(f"{name}={value}" for name, value in settings.items())]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def key(self, name: str) -> str:
        [value] = re.findall(rf"^{name}=(.+)$", (self.folder / ".env").read_text(encoding="utf-8"), re.M)
        return str(value)

    def __call__(self, *words: str, code: int | None = 0) -> str:
        """What compose prints; its exit code must be `code`. None: any but 0."""
        command = [*self._command, *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        assert done.returncode == code if code is not None else done.returncode, f"{words}:\n{text}"
        return text

    def about(self, service: str) -> dict[str, Any]:
        """What the daemon says of a service's container."""
        about: dict[str, Any] = json.loads(docker("inspect", self("ps", "-q", service).strip()))[0]
        return about

    def ask(self, service: str, path: str, body: object = None, *, key: str = "") -> tuple[int, str]:
        return ask(self.ports[service], path, body, key=self.key(key) if key else "")

    def until(self, what: Callable[[], bool], *, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self("logs", "--no-color", "--tail", "60")
            time.sleep(1)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Compose]:
    """The project, up and well; down again at the end, with its volumes."""
    compose = Compose(folder)
    try:
        compose("up", "-d", "--no-build")
        compose.until(lambda: all(health(compose, service) == "healthy" for service in SERVICES))
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "20")


def health(compose: Compose, service: str) -> str:
    return str(compose.about(service)["State"]["Health"]["Status"])


def status(compose: Compose) -> str:
    """What the server says of itself."""
    return str(json.loads(compose.ask("serve", "/health")[1])["status"])


def check_before_a_model(compose: Compose) -> None:
    """Only this machine reaches the ports; without the key nothing is told; the server waits, once."""
    for service in SERVICES:
        about = compose.about(service)
        [bound] = [one for port in about["NetworkSettings"]["Ports"].values() for one in port or ()]
        assert bound == {"HostIp": "127.0.0.1", "HostPort": str(compose.ports[service])}
        assert about["RestartCount"] == 0 and about["Config"]["User"].endswith(":0")
    assert compose.ask("ui", "/")[0] == 401
    assert "<html" in compose.ask("ui", "/", key="EDGE_API_KEY")[1]
    compose.until(lambda: status(compose) == "waiting", seconds=60)
    assert compose.ask("serve", "/v1/models", key="EDGE_API_KEY")[0] == 503
    assert "waiting for an export: runs/run is not there yet" in compose("logs", "--no-color", "serve")


def train(compose: Compose, folder: Path) -> None:
    """A run by the commands that a user types, in named volumes."""
    write_run(folder)
    page = compose("ps", "-q", "ui").strip()
    for name in ("models", "data", "runs"):
        docker("cp", f"{folder / name}/.", f"{page}:/work/{name}")
    train_and_export(functools.partial(compose, "exec", "-T", "ui", "edge"))


def answers(compose: Compose) -> bool:
    """Whether the server answers a question, through its mapped port, with the key and not without."""
    assert compose.ask("serve", "/v1/chat/completions", QUESTION)[0] in (0, 401)
    code, text = compose.ask("serve", "/v1/chat/completions", QUESTION, key="EDGE_API_KEY")
    return code == 200 and json.loads(text)["usage"]["completion_tokens"] > 0


def check_reload(compose: Compose) -> None:
    """Another export is taken on reload, by the admin's key alone; a restart serves again."""
    compose("exec", "-T", "ui", "edge", "export", "gguf", "runs/run", "--quant", "Q4_0", "--overwrite")
    assert compose.ask("serve", "/admin/reload", {}, key="EDGE_API_KEY")[0] in (401, 403)
    code, text = compose.ask("serve", "/admin/reload", {}, key="EDGE_ADMIN_KEY")
    assert code == 200 and json.loads(text)["changed"], text
    assert answers(compose)
    compose("restart", "serve")
    compose.until(lambda: answers(compose))


def check_memory(compose: Compose) -> None:
    """A model beyond the container's limit is named with both sizes; it is served when it fits."""
    compose.set(EDGE_MEMORY="200m")
    compose("up", "-d", "--no-build", "serve")
    compose.until(lambda: "MiB" in compose("logs", "--no-color", "serve"))
    lines = [line for line in compose("logs", "--no-color", "serve").splitlines() if "MiB" in line]
    say("   in 200 MiB: " + lines[0].partition("|")[2].strip())
    assert "200 MiB" in lines[0] or "limit" in lines[0], lines
    assert compose.about("serve")["RestartCount"] == 0
    assert status(compose) == "waiting"
    compose.set(EDGE_MEMORY="4g")
    compose("up", "-d", "--no-build", "serve")
    compose.until(lambda: answers(compose))


def check_stop(compose: Compose) -> None:
    """A page that is stopped tells what it has started, and is there again with it."""
    compose("exec", "-T", "ui", "python", "-c", START_A_JOB)
    start = time.monotonic()
    compose("stop", "ui")
    assert time.monotonic() - start < 30
    compose("start", "ui")
    compose.until(lambda: health(compose, "ui") == "healthy")
    state = compose("exec", "-T", "ui", "cat", "jobs/0001/state.json")
    assert json.loads(state)["exit_code"] != 0, state


def check_refusals(compose: Compose) -> None:
    """A port in use, and a GPU that is not there: said by name, with what runs left as it was."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = compose.ports["ui"]
        compose.set(EDGE_UI_PORT=taken.getsockname()[1])
        text = compose("up", "-d", "--no-build", "ui", code=None)
        assert "already in use" in text or "already allocated" in text, text
    compose.set(EDGE_UI_PORT=port)
    compose("up", "-d", "--no-build", "ui")
    docker("tag", IMAGES["serve"], f"{IMAGES['serve']}:gpu")
    files = ("-f", "compose.yaml", "-f", "compose.gpu.yaml")
    text = compose(*files, "up", "-d", "--no-build", "serve", code=None)
    assert 'could not select device driver "nvidia"' in text, text
    docker("rmi", f"{IMAGES['serve']}:gpu")


def check(folder: Path) -> None:
    """All of it, in a folder that is made."""
    folder.mkdir(parents=True)
    with started(folder) as compose:
        check_before_a_model(compose)
        train(compose, folder)
        compose.until(lambda: answers(compose))
        say(f"   asked through the mapped port 127.0.0.1:{compose.ports['serve']}")
        check_reload(compose)
        check_memory(compose)
        check_stop(compose)
        check_refusals(compose)
