"""`edge train` beside another program that takes the same YAML: seconds from start to adapter.

    python -m bench.training.whole examples/smollm2_qlora.yaml --peer "llamafactory-cli train" --rounds 3
    python -m bench.training.whole examples/smollm2_qlora.yaml quantization_bit=null --peer "python peer.py"

Each side is a process of its own, in turn. It gets a YAML of the same keys with an output_dir of its own. An
adapter and a trainer_state.json of as many steps must lie there at its end. The time is that of the whole
process: imports, loading, steps, writing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from bench.measure import metrics
from bench.measure.process_probe import noise, warnings
from bench.servers.target import last_lines
from convert.config import load_train_config, recorded
from edge.artefact import manifest
from edge.console import guarded
from edge.errors import EdgeError, UsageError
from edge.machine import hardware

EDGE = (sys.executable, "-m", "edge.cli", "train")
_PACKAGES = ("edge", "torch", "transformers", "peft", "bitsandbytes")


def keys_of(config: Path, overrides: list[str]) -> dict[str, Any]:
    """The keys that the YAML and the overrides give, as both sides read them; paths absolute.

    Raises what `load_train_config` raises.
    """
    values = recorded(load_train_config(config, overrides))
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    given |= {name.partition("=")[0].strip(): None for name in overrides}
    known = {key: values.get(key, value) for key, value in given.items()}
    # Without tuples, which YAML does not have.
    plain: dict[str, Any] = json.loads(json.dumps(known))
    return {key: value for key, value in plain.items() if value is not None}


def once(command: list[str], keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train by `keys` with a program that takes a YAML's path; its seconds and what it logged.

    Raises EdgeError with the last words of a program that fails or leaves no adapter.
    """
    out = folder / "out"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(keys | {"output_dir": str(out)}, allow_unicode=True), encoding="utf-8")
    began = time.perf_counter()
    done = subprocess.run([*command, str(path)], capture_output=True, check=False)
    seconds = time.perf_counter() - began
    states = [*out.rglob("trainer_state.json")]
    if done.returncode or not states or not [*out.rglob("adapter_model.safetensors")]:
        said = last_lines(done.stderr or done.stdout, 6)
        raise EdgeError(f"{shlex.join(command)} trained no adapter", "\n  ".join(said))
    state = json.loads(states[0].read_text(encoding="utf-8"))
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    return {"seconds": seconds, "steps": state["global_step"], "last_loss": losses[-1] if losses else None}


def compare(keys: dict[str, Any], peer: list[str], rounds: int) -> dict[str, Any]:
    """Rounds of both sides in turn. Raises EdgeError where they made another number of steps."""
    sides: dict[str, list[dict[str, Any]]] = {"edge": [], "peer": []}
    commands = {"edge": [*EDGE], "peer": peer}
    for number in range(rounds):
        for side in [*sides][:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
                found = once(commands[side], keys, Path(folder))
            sides[side].append(found)
            sys.stderr.write(
                f"round {number + 1} of {rounds}: {side}: {found['seconds']:.1f} s, {found['steps']} steps, "
                f"loss {found['last_loss']}\n"
            )
    if len({found["steps"] for side in sides.values() for found in side}) > 1:
        raise EdgeError("the two sides made another number of steps", "compare what their logs say")
    mine, theirs = ([found["seconds"] for found in sides[side]] for side in ("edge", "peer"))
    better = metrics.ratio(theirs, mine)
    return {
        "rounds": sides,
        "seconds": {"edge": statistics.median(mine), "peer": statistics.median(theirs)},
        "better_by": asdict(better) if better else None,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.whole", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--peer", required=True, help="a command that is given the path of the YAML")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    if options.rounds < 1:
        raise UsageError("--rounds is a whole number from 1 on")
    keys = keys_of(options.config, options.overrides)
    before = noise()
    found = compare(keys, shlex.split(options.peer), options.rounds)
    report = {
        "command": "python -m bench.training.whole " + shlex.join(argv),
        "keys": keys,
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
        "warnings": warnings(before, noise()),
    }
    sys.stdout.write(json.dumps(report | found, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
