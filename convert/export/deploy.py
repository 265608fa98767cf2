"""`edge export deploy RUN --to ENGINE`: the files with which another engine serves the model of a run.

    edge export deploy runs/magic-conch --to vllm     # runs/magic-conch/deploy/vllm

An engine is a module with `write(run, folder, context)`: it fills the empty `folder` (RUN/deploy/ENGINE), and
returns the command that serves it and the folder of the model that it serves. Paths in its files are relative
to RUN, so that a run can be copied to the machine that serves it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from convert.model.hf_folder import shell
from edge.artefact import manifest
from edge.errors import InputError

# What `--to` takes, and the module that writes it.
TARGETS = {"vllm": "convert.export.deploy_vllm", "ray": "convert.export.deploy_ray"}


def run(given: Path, target: str, *, context: int | None = None, overwrite: bool = False) -> Path:
    """Write `given`/deploy/`target` and print the command that serves it; the folder.

    context: tokens of a conversation; None: as many as the model has. Raises InputError where `given` has no
    model that the engine reads, ExistsError without `overwrite`.
    """
    if not given.is_dir():
        raise InputError(f"no such folder: {given}", "give a run's folder")
    # Its merged model stands for a run.
    if given.name == "merged" and (given / manifest.FILE).is_file():
        given = given.absolute().parent
    folder = given / "deploy" / target
    with manifest.publish(folder, overwrite=overwrite) as partial:
        command, source = importlib.import_module(TARGETS[target]).write(given, partial, context)
        origin = manifest.Manifest("model", source.absolute().name)
        if (source / manifest.FILE).is_file():
            origin = manifest.read(source)
        record = origin.child("deploy", source, settings={"to": target}, packages=())
        manifest.write(partial, record)
    sys.stdout.write(f"{folder}\n  serve it: cd {shell(given)} && {command}\n")
    return folder
