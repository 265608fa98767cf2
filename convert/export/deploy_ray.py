"""Ray Serve's configuration for a run: `serve deploy` starts replicas of our own server, and updates them.

The options behind `edge serve` stand in it as words. Version and digest are those of now: a new export, or
another edge, needs a new configuration, whose difference is what makes Ray replace the replicas.
"""

from __future__ import annotations

from pathlib import Path

import yaml

import edge
from edge.artefact import find
from edge.errors import UsageError

CONFIG = "serve.yaml"
_README = """\
Ray Serve runs this model in replicas, each with an engine of its own. On every node: edge with the extra
`ray`, and this run at {run}. On the first one:

    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
    export {variable}={value}
    ray start --head
    {command}

`command` in {config} is what stands behind `edge serve`: --replicas, --ctx, --slots. API keys come from
EDGE_API_KEY or the file EDGE_API_KEY_FILE in the environment of `ray start`. After a new export write the
configuration anew (--overwrite) and deploy it again: replicas are replaced one by one.
"""


def write(run: Path, folder: Path, context: int | None) -> tuple[str, Path]:
    """As `convert.export.deploy` says. Raises InputError for a run without an export that edge serves."""
    from edge.server.ray_entrance import APP, VALUE, VARIABLE

    artefact = find.resolve(run)
    trained = artefact.header.context_length
    if context is not None and context > trained:
        raise UsageError(f"--ctx {context}: the model has {trained} positions", "leave --ctx out")
    # Ray's processes have a working folder of their own.
    words = [str(run.absolute()), "--name", artefact.name, "--replicas", "1-2"]
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "edge.server.ray_app:application",
                "args": {
                    "edge": edge.__version__,
                    "digest": artefact.digest,
                    "command": [*words, *(["--ctx", str(context)] if context else [])],
                },
            }
        ],
    }
    # ASCII alone: Ray opens the file in the machine's own encoding.
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="ascii")
    command = f"serve deploy deploy/ray/{CONFIG}"
    text = _README.format(run=run.absolute(), variable=VARIABLE, value=VALUE, command=command, config=CONFIG)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return command, artefact.path.parent
