"""`edge serve --replicas`: the same application as Ray Serve replicas, each with an engine of its own.

Ray's proxy takes the connections, and Ray's ConsistentHashRouter chooses the replica by the session that a
request belongs to. `edge.server.ray_entrance` runs inside that proxy.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.requests import Request
from starlette.types import ASGIApp

import edge
from edge.console import STOP_SIGNALS, handling
from edge.errors import EdgeError, InputError, RequestError, UnavailableError, UsageError
from edge.progress import report
from edge.rendering.client import RENDERER
from edge.server import options, ray_entrance
from edge.server.access import KEY_VARIABLE, Access
from edge.server.api import health
from edge.server.app import create_app
from edge.server.launch import say, url_of
from edge.server.model_plans import plan_all
from edge.server.model_registry import Planned, Registry

# Ray's least is 75 MiB; nothing but requests and answers goes through its store.
_STORE = 80 * 2**20
# What Ray reads when it starts: no telemetry, our entrance, and replicas that see the GPUs.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    ray_entrance.VARIABLE: ray_entrance.VALUE,
}
_ERROR = re.compile(r"edge\.errors\.\w+: (.+(?:\n  (?! ).+)?)")
_FORMAT = "%(levelname)s %(name)s: %(message)s"


class Replica:
    """One replica: the application and its engine. Ray makes it, asks for its health and ends it."""

    # Ray awaits it: a replica takes requests when its model is loaded.
    async def __init__(  # type: ignore[misc]
        self, name: str, planned: Planned, access: Access, accept_any: bool
    ) -> None:
        logging.basicConfig(level=logging.INFO, format=_FORMAT)
        self._registry = Registry({name: lambda: planned}, accept_any=accept_any)
        self._app = create_app(self._registry, access)
        # What a route needs of a request that asks for this replica's state.
        self._request = Request({"type": "http", "app": self._app})
        RENDERER.start()
        await self._registry.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def check_health(self) -> None:
        """As /ready: raises RequestError where no engine answers."""
        await health.ready(self._request)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What this replica says of itself; Ray hands it to the routers every second, past the queue."""
        metrics = await health.metrics(self._request)
        pages: dict[str, Any] = {"/metrics": bytes(metrics.body).decode("utf-8")}
        for path, route in (("/health", health.health), ("/ready", health.ready), ("/info", health.info)):
            try:
                pages[path] = await route(self._request)
            except RequestError as error:
                pages[path] = error
        return pages

    async def __del__(self) -> None:
        await self._registry.close(0.5)


class Router(ConsistentHashRouter):  # type: ignore[misc]
    """Ray's router by sessions, which also hands what the replicas say to `ray_entrance` in its process."""

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        ray_entrance.states = {each.replica_id.unique_id: each.routing_stats for each in replicas}


def deployment(
    name: str,
    planned: Planned,
    access: Access,
    *,
    replicas: tuple[int, int],
    drain: float,
    accept_any: bool = False,
) -> serve.Application:
    """The replicas of one model, as Ray deploys them. drain: seconds for running answers of one that ends.

    A replica takes as many requests as it has slots. All others wait in the proxy, where no replica that dies
    loses them.
    """
    fewest, most = replicas
    slots = int(planned.load.settings["slots"])
    scale: dict[str, Any] = {"num_replicas": fewest}
    if fewest < most:
        bounds = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": max(1, slots / 2)}
        scale = {"autoscaling_config": bounds}
    made = serve.deployment(serve.ingress()(Replica)).options(
        name=ray_entrance.DEPLOYMENT,
        **scale,
        ray_actor_options={"num_cpus": planned.load.settings.get("threads", 1)},
        max_ongoing_requests=slots,
        max_queued_requests=planned.load.max_queue,
        backpressure_config={"status_code": 429},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=drain,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        max_constructor_retry_count=1,
        request_router_config={
            "request_router_class": f"{__name__}.{Router.__name__}",
            "request_routing_stats_period_s": 1.0,
            "request_router_kwargs": {"num_fallback_replicas": most - 1},
            # A slot that was freed is noticed after so long.
            "max_backoff_s": 0.25,
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return made.bind(name, planned, access, accept_any)


def application(settings: dict[str, Any]) -> serve.Application:
    """What a config of `edge export deploy --to ray` builds on the head node. Raises EdgeError.

    settings: "edge", the version that wrote the config; "command", the words behind `edge serve`; "digest" of
    the artefact, which a new export changes.
    """
    if settings.get("edge") != edge.__version__:
        raise UsageError(
            f"the config is of edge {settings.get('edge')}, this is edge {edge.__version__}",
            "write it anew: edge export deploy RUN --to ray",
        )
    if os.environ.get(ray_entrance.VARIABLE) != ray_entrance.VALUE:
        raise UnavailableError(
            "Ray was started without edge's entrance to its proxy",
            f"stop it, and start it with {ray_entrance.VARIABLE}={ray_entrance.VALUE}",
        )
    try:
        args = options.parser().parse_args(settings["command"])
    except SystemExit as error:
        raise UsageError(f"the config's command is none of edge serve: {settings['command']}") from error
    if args.api_key_file is not None:
        raise UsageError(
            "--api-key-file does not go with a config: Ray's proxy reads the keys too",
            f"start Ray with {KEY_VARIABLE} or {ray_entrance.KEY_FILE_VARIABLE} in its environment",
        )
    file = os.environ.get(ray_entrance.KEY_FILE_VARIABLE)
    args.api_key_file = Path(file) if file else None
    access = options.access_of(args)
    args.replicas = options.replicas_of(args)
    app, planned = _replicated(args, access)
    digest = planned.artefact.digest if planned.artefact else ""
    if digest != settings.get("digest", digest):
        raise InputError(
            f"{args.paths[0]} holds another export than the config was written for",
            "write it anew: edge export deploy RUN --to ray",
        )
    return app


def main(args: argparse.Namespace, access: Access) -> int:
    """Serve until a signal comes; the exit code. Raises EdgeError where the replicas cannot be made."""
    report("planning")
    app, planned = _replicated(args, access)
    if args.api_key_file is not None:
        os.environ[ray_entrance.KEY_FILE_VARIABLE] = str(args.api_key_file.absolute())
    settings = planned.load.settings
    fewest, most = args.replicas
    count = str(most) if fewest == most else f"{fewest} to {most}"
    cpus = most * int(settings["threads"])
    shape = f"{count} replicas, {settings['threads']} threads each, context {settings['context']}"
    return run(app, args.host, args.port, cpus, shape)


def run(app: serve.Application, host: str, port: int, cpus: int, shape: str) -> int:
    """Start a Ray of this machine alone, serve `app` until a signal comes, and drain. Raises EdgeError."""
    url = url_of(host, port)
    say(f"{url}  (loading by Ray Serve; /docs describes the interface, Ctrl-C ends it)")
    report("loading", url=url)
    began, stopped = time.monotonic(), threading.Event()
    os.environ.update(_ENVIRONMENT)
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_STORE,
            logging_level=logging.ERROR,
            # Ray's own processes talk over this address.
            _node_ip_address="127.0.0.1",
        )
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnavailableError(f"Ray could not be started: {reason}", "its logs are in /tmp/ray") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with handling(STOP_SIGNALS, lambda *_: stopped.set()):
            # Its controller and proxy write a traceback for what this process says in a sentence.
            quiet = {"log_level": "CRITICAL", "enable_access_log": False}
            where = {"host": host, "port": port}
            serve.start(proxy_location="HeadOnly", http_options=where, logging_config=quiet)
            try:
                serve.run(app, name=ray_entrance.APP, route_prefix="/")
            except RuntimeError as error:
                raise _failure() from error
            say(f"ready in {time.monotonic() - began:.1f} s: {shape}")
            report("ready", url=url)
            stopped.wait()
            serve.delete(ray_entrance.APP)
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _failure() -> EdgeError:
    """Why no replica could be made, as the replica's own error says."""
    status = serve.status().applications[ray_entrance.APP]
    text = "\n".join([status.message, *(each.message for each in status.deployments.values())])
    match = _ERROR.search(text)
    return EdgeError(match[1] if match else f"Ray could not make the replicas: {text}")


def _replicated(args: argparse.Namespace, access: Access) -> tuple[serve.Application, Planned]:
    [(name, plan)] = plan_all(args).items()
    planned = plan()
    # A route that changes the server would change one replica.
    access = dataclasses.replace(access, admin_keys=())
    shape = {"replicas": args.replicas, "drain": args.drain, "accept_any": args.accept_any_model}
    return deployment(name, planned, access, **shape), planned
