"""Where the figures of a run are reported to, beside trainer_log.jsonl: the values of report_to."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.config import TrainConfig, recorded
from edge.errors import UnavailableError

# As LLaMA-Factory's callback and transformers' have them in lines of the log.
_KEYS = ("loss", "eval_loss", "eval_accuracy", "lr", "grad_norm", "throughput")


class Trackers:
    """Every tracker that `config` names, open until `close`. folder: the run's. Raises as `named`."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._open = [_OPEN[name](config, folder) for name in named(config)]

    def log(self, line: dict[str, Any]) -> None:
        """Report one line of trainer_log.jsonl."""
        figures = {f"train/{key}": line[key] for key in _KEYS if key in line}
        for log, _ in self._open:
            log(figures, line["current_steps"])

    def close(self) -> None:
        for _, close in self._open:
            close()


# Of one tracker: what logs figures at a step, and what closes it.
Tracker = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def named(config: TrainConfig) -> list[str]:
    """The trackers that are reported to; of `all`, those that are installed.

    Raises UnavailableError for one whose package is not.
    """
    names = [name for name in config.report_to if name not in ("none", "all")]
    if "all" in config.report_to:
        names += [name for name in _OPEN if importlib.util.find_spec(name) is not None]
    names += ["swanlab"] if config.use_swanlab else []
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(
                f"report_to: {name} needs the package '{name}'", f"pip install {name}, or leave it out"
            )
    return list(dict.fromkeys(names))


def _run_name(config: TrainConfig) -> str:
    return config.run_name or Path(config.output_dir).absolute().name


def _tensorboard(config: TrainConfig, folder: Path) -> Tracker:
    board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "runs"))

    def log(figures: dict[str, float], step: int) -> None:
        for key, value in figures.items():
            board.add_scalar(key, value, step)

    return log, board.close


def _wandb(config: TrainConfig, folder: Path) -> Tracker:
    wandb: Any = importlib.import_module("wandb")
    wandb.init(project=config.project, name=_run_name(config), dir=str(folder), config=recorded(config))
    return lambda figures, step: wandb.log(figures, step=step), wandb.finish


def _trackio(config: TrainConfig, folder: Path) -> Tracker:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=config.project, name=_run_name(config), config=recorded(config))
    return lambda figures, step: trackio.log(figures, step=step), trackio.finish


def _swanlab(config: TrainConfig, folder: Path) -> Tracker:
    swanlab: Any = importlib.import_module("swanlab")
    swanlab.init(
        project=config.swanlab_project,
        workspace=config.swanlab_workspace,
        experiment_name=config.swanlab_run_name or _run_name(config),
        mode=config.swanlab_mode,
        logdir=config.swanlab_logdir,
        config=recorded(config),
    )
    return lambda figures, step: swanlab.log(figures, step=step), swanlab.finish


def _mlflow(config: TrainConfig, folder: Path) -> Tracker:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.start_run(run_name=_run_name(config))
    mlflow.log_params(recorded(config))

    def log(figures: dict[str, float], step: int) -> None:
        mlflow.log_metrics(figures, step=step)

    return log, mlflow.end_run


_OPEN: dict[str, Callable[[TrainConfig, Path], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "swanlab": _swanlab,
    "mlflow": _mlflow,
}
