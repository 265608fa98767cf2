"""deploy/: what compose.yaml opens, asks for and keeps; the key that init writes; what an image is made of.

That the images are built and work is the matter of tests/container_images.py.
"""

from __future__ import annotations

import http.server
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge.setup import EXTRAS
from tests.test_docs import unknown_options
from tests.test_layout import imports, sources

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["ui", "serve"])
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(yaml.safe_load(text("compose.yaml"))["services"][request.param])


def test_only_this_machine_reaches_the_ports(service: dict[str, Any]) -> None:
    [port] = service["ports"]
    inner = port.rpartition(":")[2]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{EDGE_(UI|SERVE)_PORT:-" + inner + r"\}:" + inner, port)
    assert inner in ("7860", "8000")


def test_without_a_key_nothing_is_started(service: dict[str, Any]) -> None:
    assert service["environment"]["EDGE_API_KEY"].startswith("${EDGE_API_KEY:?run init")


def test_nobody_is_root(service: dict[str, Any]) -> None:
    assert service["user"] == "${EDGE_UID:-1000}:0"
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


def test_it_is_watched_started_again_and_has_shared_memory(service: dict[str, Any]) -> None:
    port = service["ports"][0].rpartition(":")[2]
    assert service["healthcheck"]["test"] == ["CMD", "edge-entrypoint", "health", port]
    assert service["restart"] == "unless-stopped" and service["shm_size"] == "2gb" and service["init"] is True


def test_volumes_are_folders_that_the_entry_point_checks(service: dict[str, Any]) -> None:
    named = yaml.safe_load(text("compose.yaml"))["volumes"]
    for volume in service["volumes"]:
        match = re.fullmatch(r"\$\{EDGE_(\w+):-(\w+)\}:(/\w+(?:/\w+)?)(:ro)?", volume)
        assert match and match[2] in named and match[1] == match[2].upper(), volume
        assert match[4] or match[3] in text("entrypoint.sh"), volume
        assert match[3] in text("Dockerfile"), volume


def test_the_server_waits_for_a_model_by_options_that_exist() -> None:
    command = yaml.safe_load(text("compose.yaml"))["services"]["serve"]["command"]
    assert command[0] == "serve" and "--wait" in command
    assert unknown_options(" ".join(["edge", *command])) == []
    assert unknown_options("edge ui --host 0.0.0.0") == [] and '"ui", "--host", "0.0.0.0"' in text(
        "Dockerfile"
    )


def test_the_gpu_is_reserved_by_the_second_file_alone() -> None:
    plain, gpu = (yaml.safe_load(text(name))["services"] for name in FILES)
    assert set(plain) == set(gpu)
    for name in gpu:
        assert "deploy" not in plain[name]
        [device] = gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert gpu[name]["build"]["args"]["CUDA"] == "1" and gpu[name]["image"] != plain[name]["image"]


def test_every_setting_is_explained_once() -> None:
    used = {name for file in FILES for name in re.findall(r"\$\{(\w+):[-?]", text(file))}
    explained = re.findall(r"^#?(\w+)=", text("env.example"), re.MULTILINE)
    assert len(explained) == len(set(explained))
    # These the programs read themselves.
    of_programs = {"EDGE_ADMIN_KEY", "COMPOSE_PROJECT_NAME", "HF_ENDPOINT", "USE_MODELSCOPE_HUB"}
    assert used | of_programs == set(explained)


def test_the_images_build_from_what_is_there() -> None:
    dockerfile = text("Dockerfile")
    for extras in re.findall(r"sh deploy/install\.sh (\S+)", dockerfile):
        assert set(extras.split(",")) <= set(EXTRAS)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    for copied in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE):
        for source in copied.split():
            assert list(ROOT.glob(source)), source
            kept = (f"!{source.split('/')[0]}", f"!{source}")
            assert any(line in ignored for line in kept), source
    for stage in dockerfile.split("\nFROM ")[-2:]:
        assert "USER 1000:0" in stage
    final = dockerfile[dockerfile.index("FROM ${BASE} AS base") :]
    assert "build-essential" not in final and "PIP_INDEX_URL" not in final


def test_what_builds_llamacpp_is_copied_before_it_is_run() -> None:
    texts, seen, todo = sources(), set[str](), ["edge.machine.build_llamacpp", "edge.setup"]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += [name for _, name in imports(module, texts)]
    copied = re.findall(r"^COPY edge/(\w+) edge/", text("Dockerfile"), re.MULTILINE)
    folders = {name.split(".")[1] for name in seen if name.count(".") > 1}
    assert folders == set(copied) - {"csrc"} and all(name.startswith("edge.") for name in seen)


def test_requirements_are_the_projects() -> None:
    """install.sh reads them out of pyproject.toml with a program of its own."""
    program = text("install.sh").split("<<'PYTHON'\n")[1].split("PYTHON\n")[0]
    done = subprocess.run(
        [sys.executable, "-c", program, "serve,onnx"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.split() == [*project["dependencies"], *extras["serve"], *extras["onnx"]]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """deploy/ as a clone has it."""
    ignored = shutil.ignore_patterns(".env")
    return Path(shutil.copytree(DEPLOY, tmp_path / "ein Ordner" / "deploy", ignore=ignored))


def init(folder: Path) -> str:
    done = subprocess.run(["sh", str(folder / "init")], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="init is for a POSIX shell")
def test_init_makes_a_key_once(copied: Path) -> None:
    assert "the key is in it" in init(copied)
    file = copied / ".env"
    written = file.read_text(encoding="utf-8")
    settings = dict(re.findall(r"^(\w+)=(.*)$", written, re.MULTILINE))
    keys = [settings["EDGE_API_KEY"], settings["EDGE_ADMIN_KEY"]]
    assert all(re.fullmatch(r"[0-9a-f]{48}", key) for key in keys) and keys[0] != keys[1]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    owner = os.getuid() if sys.platform == "linux" and os.getuid() else 1000
    assert settings["EDGE_UID"] == str(owner)
    assert "stays as it is" in init(copied)
    assert file.read_text(encoding="utf-8") == written
    assert sorted(path.name for path in copied.iterdir() if path.name.startswith(".env")) == [".env"]


def enter(*words: str) -> subprocess.CompletedProcess[str]:
    """The images' entry point, on this machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), *words],
        env={**os.environ, "PATH": path, "EDGE_LLAMA_CPU": "native"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the images are Linux")
def test_a_container_is_well_while_it_answers_even_to_ask_for_a_key() -> None:
    statuses = [200, 401, 503]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health"
            self.send_response(statuses.pop(0))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [enter("health", str(port)).returncode for _ in range(3)] == [0, 0, 1]
        server.shutdown()
    gone = enter("health", str(port))
    assert gone.returncode == 1 and "Traceback" not in gone.stderr


@pytest.mark.skipif(sys.platform == "win32" or Path("/cache").exists(), reason="a /cache is there")
def test_a_folder_that_cannot_be_written_is_named_with_the_cure() -> None:
    refused = enter("serve", "runs/run")
    first, second = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert first == f"error: /cache cannot be written by the container's user {os.getuid()}"
    assert "chown" in second and "EDGE_UID" in second


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["cpu", "gpu"])
def test_docker_compose_takes_the_files(copied: Path, files: tuple[str, ...]) -> None:
    named = [word for file in files for word in ("-f", file)]
    command = ["docker-compose", *named, "config"]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_")}
    refused = subprocess.run(command, cwd=copied, capture_output=True, text=True, env=bare, check=False)
    assert refused.returncode != 0 and "run init in the folder deploy" in refused.stderr
    init(copied)
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True, env=bare, check=False)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["ui"]["ports"] == ["127.0.0.1:7860:7860/tcp"]
    arguments = services["ui"]["build"]["args"]
    if len(files) == 1:
        assert arguments["BASE"] == "debian:bookworm-slim" and "CUDA" not in arguments
    else:
        # What is compiled in the one runs in the other.
        assert arguments["BASE"].replace("runtime", "devel") == arguments["BUILD_BASE"]
