"""What the terminal shows while a model is trained."""

import io
import re

import pytest
from rich.console import Console

from convert.config import parse
from convert.train.callbacks import Watch
from convert.train.checkpoint import Best
from convert.train.distributed import World
from convert.train.trainer import Progress


class Loop:
    """As much of a loop as the progress line reads, at step 3,217 of 10,000."""

    def __init__(self, folder):
        given = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(folder), "logging_steps": 10**6}
        self.config = parse(given | {"save_strategy": "no"})
        self.world, self.items, self.device = World(), [None] * 100, "cpu"
        self.state = Progress(total=10_000)


def shown(folder, width):
    """The last progress line, without colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    loop = Loop(folder)
    with Watch(loop, folder, console, Best(), evaluate=None, save=lambda best: folder, ask=list) as watch:
        state = loop.state
        state.step, state.loss, state.smooth, state.norm, state.rate = 3217, 1.2345, 1.3456, 0.78, 2e-4
        state.seconds, state.tokens = 100.0, 123_400
        watch(state)
    text = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", console.file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.startswith("training")]
    return lines[-1].rstrip()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_step_percentage_and_time_left_come_first(tmp_path, width):
    line = shown(tmp_path, width)
    assert re.match(r"training +3217/10000 +32% +(-:--:--|\d+:\d\d:\d\d) left", line), line
    assert len(line) <= width and "…" not in line
    words = ("loss 1.2345", "tokens/s", "smoothed 1.3456", "lr 2.0e-04", "norm 0.78", "GiB")
    count = {40: 0, 60: 0, 80: 2, 120: 5, 200: 6}[width]
    assert [word in line for word in words] == [n < count for n in range(len(words))], line
