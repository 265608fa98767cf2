"""A run that was stopped goes on as if it had not been, from the last checkpoint that is whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from convert.train import checkpoint, cli, finetune, trainer
from edge.artefact import manifest
from edge.errors import EdgeError, ExistsError, InputError, UsageError
from tests.support.matrix import few
from tests.support.runs import ROWS, configure

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def configured(folder, base):
    """With all that is drawn at random, so that the way of a run depends on its random numbers."""
    return configure(
        folder, base, quantization_bit=4, gradient_accumulation_steps=2, lora_dropout=0.1,
        neftune_noise_alpha=5, lr_scheduler_type="cosine", num_train_epochs=3, save_steps=2,
    )  # fmt: skip


@pytest.fixture
def made(tmp_path, base):
    return configured(tmp_path, base)


@pytest.fixture
def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The adapter of a run that was never stopped."""
    config = configured(tmp_path_factory.mktemp("whole"), base)("whole")
    return finetune.run(config, console=Console(quiet=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory, base):
    """The adapter of a run of four steps, with checkpoints behind the second and the fourth."""
    config = configured(tmp_path_factory.mktemp("four"), base)("four", max_steps=4)
    return finetune.run(config, console=Console(quiet=True))


def weights(target):
    return load_file(target / "adapter_model.safetensors")


def stop_at(monkeypatch, step):
    """Ctrl-C comes in the midst of the step behind `step`, after its first micro-batch."""
    real = trainer.Loop._step

    def stepped(self, epoch, group, stop):
        calls = iter([False, self.state.step >= step])
        return real(self, epoch, group, lambda: next(calls, False))

    monkeypatch.setattr(trainer.Loop, "_step", stepped)


def same(first, second):
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def lines(folder):
    text = (folder / "trainer_log.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [(one["current_steps"], one["loss"], one["lr"], one["total_tokens"]) for one in found]


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.matrix)]
)
def test_t13_the_same_way_as_a_run_that_was_never_stopped(made, whole, tmp_path, monkeypatch, quiet, step):
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(
            finetune.Stopped, match=f"stopped at step {step} of 9; .*checkpoint-{step}"
        ) as caught:
            finetune.run(made(), console=quiet, again="edge train x --resume")
    assert "go on with: edge train x --resume" in str(caught.value) and caught.value.exit_code == 130
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(ExistsError, match="left of a run that did not end"):
        finetune.run(made(), console=quiet)
    resumed = finetune.run(made(resume_from_checkpoint=True), console=quiet)
    same(whole, resumed)
    assert lines(whole.parent) == lines(resumed.parent)


def test_t13_more_epochs_and_nothing_left_to_do(made, quiet):
    first = finetune.run(made(), console=quiet)
    with pytest.raises(EdgeError, match=r"nothing is left to do: .*checkpoint-9 has done 9 of 9 steps"):
        finetune.run(made(resume_from_checkpoint=True), console=quiet)
    said = Console(record=True, width=200)
    finetune.run(made(resume_from_checkpoint=True, num_train_epochs=4), console=said)
    text = said.export_text()
    assert "num_train_epochs 3.0 is now 4.0" in text and "9 of 12 steps are done" in text
    assert manifest.read(first).settings["steps"] == 12
    assert [one[0] for one in lines(first.parent)] == list(range(1, 13))


def test_another_run_goes_on_from_a_checkpoint_and_leaves_it(made, tmp_path, quiet):
    first = finetune.run(made("first"), console=quiet)
    before = {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")}
    other = made("other", resume_from_checkpoint=str(first.parent / "checkpoint-4"))
    second = finetune.run(other, console=quiet)
    same(first, second)
    assert second.parent == tmp_path / "other" and lines(second.parent) == lines(first.parent)
    assert {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")} == before


def test_t13_other_data_is_another_run(made, tmp_path, quiet):
    finetune.run(made(max_steps=2), console=quiet)
    with pytest.raises(UsageError, match="lora_rank is 4, checkpoint-2 was trained with 8"):
        finetune.run(made(max_steps=4, lora_rank=4, resume_from_checkpoint=True), console=quiet)
    rows = [*ROWS[:-1], {"instruction": "other", "output": "thing"}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UsageError, match="the rows are not those of checkpoint-2"):
        finetune.run(made(max_steps=4, resume_from_checkpoint=True), console=quiet)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda folder: cut(folder / "optimizer.safetensors", 1000),
            "optimizer.safetensors has 1,000 bytes of",
        ),
        (lambda folder: flip(folder / "trained.safetensors"), "trained.safetensors was changed"),
        (lambda folder: (folder / "random.safetensors").unlink(), "random.safetensors is missing"),
        (lambda folder: (folder / "edge.json").unlink(), "has no edge.json"),
        (lambda folder: cut(folder / "edge.json", 100), "cannot be read"),
    ],
)
def test_t13_a_broken_checkpoint_is_passed_over_and_said(made, four, tmp_path, quiet, harm, words):
    shutil.copytree(four.parent, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoint-4")
    said = Console(record=True, width=300)
    resumed = finetune.run(made(max_steps=4, resume_from_checkpoint=True), console=said)
    text = said.export_text()
    assert words in text and "passed over" in text and "resuming from" in text and "2 of 4 steps" in text
    same(four, resumed)
    for step in (2, 4):
        cut(tmp_path / "run" / f"checkpoint-{step}" / "trained.safetensors", 10)
    with pytest.raises(
        InputError, match=r"no checkpoint can be used: checkpoint-4 is not whole.*checkpoint-2 is"
    ):
        finetune.run(made(max_steps=4, resume_from_checkpoint=True), console=quiet)


@pytest.mark.slow
def test_t13_without_the_optimizer_and_without_any(made, tmp_path, quiet):
    with pytest.raises(InputError, match="holds no checkpoint to go on from"):
        finetune.run(made(resume_from_checkpoint=True), console=quiet)
    finetune.run(made(max_steps=2, save_only_model=True), console=quiet)
    with pytest.raises(InputError, match="checkpoint-2 has no optimizer"):
        finetune.run(made(max_steps=4, resume_from_checkpoint=True), console=quiet)
    named = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(InputError, match="checkpoint-2 has no optimizer"):
        finetune.run(made(max_steps=4, resume_from_checkpoint=named), console=quiet)


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_whole(made, tmp_path, monkeypatch, quiet):
    real = checkpoint.save_file

    def full(tensors, path, **more):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.chdir(tmp_path)
    # Both paths as output_dir was given, not one of them from the root.
    words = f"the disk is full: run; the last whole checkpoint is {Path('run', 'checkpoint-2')}"
    with pytest.raises(EdgeError, match=re.escape(words)):
        finetune.run(made(output_dir="run"), console=quiet)
    names = sorted(one.name for one in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-2", "trainer_log.jsonl"]


@pytest.mark.slow
def test_save_total_limit_and_overwrite(made, tmp_path, quiet):
    finetune.run(made(save_steps=1, save_total_limit=2), console=quiet)
    assert [step for step, _ in checkpoint.listed(tmp_path / "run")] == [8, 9]
    finetune.run(made(max_steps=1, save_strategy="no"), overwrite=True, console=quiet)
    assert checkpoint.listed(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", few([signal.SIGINT, signal.SIGKILL], [signal.SIGKILL]))
def test_a_killed_process(made, tmp_path, base, quiet, how):
    """Ctrl-C saves and says how to go on; after a kill the last checkpoint is whole."""
    config = made("killed", save_steps=1, num_train_epochs=400)
    path = tmp_path / "一 c.yaml"
    from convert.config import as_yaml

    path.write_text(as_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "edge.cli", "train", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not checkpoint.listed(tmp_path / "killed") and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"go on with: edge train '{path}' --resume" in err.decode("utf-8")
        assert "Traceback" not in err.decode("utf-8")
    found = checkpoint.find(tmp_path / "killed", "auto")
    config = made("killed", save_strategy="no", max_steps=found.step + 1, resume_from_checkpoint=True)
    target = finetune.run(config, console=quiet)
    assert manifest.read(target).settings["steps"] == found.step + 1


def test_t16_a_printed_command_can_be_pasted(tmp_path, capsys):
    path = tmp_path / "a b'c & 配置.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n", encoding="utf-8")
    argv = [str(path), "output_dir=run $1", "--print-command", "--overwrite"]
    assert cli.main(argv) == 0
    line = capsys.readouterr().out
    if sys.platform != "win32":
        loop = f'for word in {line[5:].strip()}; do printf "%s\\n" "$word"; done'
        done = subprocess.run(["sh", "-c", loop], capture_output=True, check=True)
        shown = done.stdout.decode("utf-8")
        assert shown.splitlines() == ["train", str(path), "output_dir=run $1", "--overwrite"]
    assert cli.main([str(path), "--print-config"]) == 0
    assert "model_name_or_path: m\n" in capsys.readouterr().out
