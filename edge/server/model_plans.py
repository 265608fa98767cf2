"""Which models a command line of `edge serve` names, and how each is to be loaded."""

from __future__ import annotations

import argparse
import functools
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge.artefact import find, manifest
from edge.engine.client import Worker
from edge.engine.worker import Load
from edge.errors import InputError, UsageError
from edge.loading import load_plan
from edge.server.model_registry import Planned


def plan_all(args: argparse.Namespace) -> dict[str, Callable[[], Planned]]:
    """A plan for each id. Every path is planned once, so that one that cannot be served is an EdgeError now.
    With --wait there is a single one, which is not.

    The model that is loaded at the start keeps that plan. All others are planned again when they are loaded,
    since their paths may hold another export by then.
    """
    if args.wait:
        path = args.paths[0]
        return {args.name or path.absolute().name: functools.partial(plan_awaited, path, args)}
    models: dict[str, Callable[[], Planned]] = {}
    if args.name is not None and len(args.paths) > 1:
        raise UsageError("--name goes with a single model", "the ids of several are their artefacts' names")
    if args.lora and len(args.paths) > 1:
        raise UsageError("--lora goes with a single model", "serve the model under the adapters by itself")
    # The first one answers requests that name no model: an adapter, where one was given.
    wanted = [(*lora_argument(argument), args.paths[0]) for argument in args.lora]
    for name, lora, path in [*wanted, *((args.name, None, path) for path in args.paths)]:
        plan = functools.partial(plan_model, path, args, lora)
        first = plan()
        name = name or (first.artefact.name if first.artefact is not None else path.name)
        if name in models:
            hint = "serve them one by one, with --name"
            if args.lora:
                hint = "name the adapters: --lora NAME=ADAPTER"
            raise UsageError(f"two of the models have the id '{name}'", hint)
        models[name] = plan
        if name == args.default or (args.default is None and len(models) == 1):
            models[name] = functools.partial(_first_then, [first], plan)
    return models


def begin(plan: Callable[[], Planned], process: subprocess.Popen[bytes]) -> Callable[[], Planned]:
    """The same plan, by which `process` begins to load at once: the server's own imports take a while yet."""
    first = plan()
    return functools.partial(_first_then, [replace(first, begun=Worker(first.load, process))], plan)


def plan_awaited(path: Path, args: argparse.Namespace) -> Planned:
    """As `plan_model`, of a path that may not be there yet, or not whole. The artefact's name is the id.

    Raises EdgeError also where a run's export lacks its manifest, which is written last.
    """
    if not path.exists():
        raise InputError(f"{path} is not there yet", "`edge export gguf` writes a model into a run")
    planned = plan_model(path, args)
    assert planned.artefact is not None
    folder = planned.artefact.path.parent
    if folder.parent == path.absolute() and not planned.artefact.digest:
        raise InputError(f"{folder} has no {manifest.FILE} yet", "it is what an export writes last")
    return replace(planned, artefact=replace(planned.artefact, name=args.name or planned.artefact.name))


def _first_then(first: list[Planned], plan: Callable[[], Planned]) -> Planned:
    return first.pop() if first else plan()


def lora_argument(argument: str) -> tuple[str | None, Path]:
    """(id, path) of `NAME=ADAPTER`, or of a path alone. Raises UsageError for an empty half."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, Path(argument)
    if not name or not path:
        raise UsageError(f"--lora {argument}: the name or the path is missing", "give it as NAME=ADAPTER")
    return name, Path(path)


def plan_model(path: Path, args: argparse.Namespace, lora: Path | None = None) -> Planned:
    """How the artefact at `path` is to be loaded on this machine now. Raises EdgeError.

    lora: an adapter on top. llama.cpp applies it to a whole context, so each adapter has a process of its
    own; they map the base's file, which is in memory once.
    """
    options = load_plan.Options(
        context=args.ctx,
        slots=args.slots,
        threads=args.threads,
        device=args.device,
        kv_type=args.kv_type,
        # A budget is for models, unless the cache is asked for.
        cache_ram=0 if args.cache_ram is None and args.memory_budget is not None else args.cache_ram,
        replicas=args.replicas[1] if args.replicas else 1,
    )
    # An adapter in GGUF goes on top of a GGUF.
    artefact, why = load_plan.pick(path, "llamacpp" if args.lora else args.backend, options)
    if lora is not None:
        artefact = find.with_lora(artefact, lora)
    plan = load_plan.plan(artefact, options)
    load = Load.of(
        artefact,
        plan.settings,
        max_queue=args.max_queue,
        tune=not args.no_tune,
        store=str(args.kv_store.absolute()) if args.kv_store else "",
        store_mib=args.kv_store_mib,
        cache_ram=plan.cache_ram,
        why=f"{artefact.kind}: {why}",
    )
    return Planned(load, artefact, plan.bytes)
