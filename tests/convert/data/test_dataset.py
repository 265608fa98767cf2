"""Data sets: every bad row has a number and a reason, and ids and masks are those that serving needs."""

import dataclasses
import json
from pathlib import Path

import pytest

from convert.data import dataset, dataset_info, encode
from convert.model import chat_format
from edge.chat_template import ChatTemplate
from edge.errors import InputError, UsageError
from tests.support.toy import CHATML, IM_END, IM_START, THINKING, make_stub

ROW = {"instruction": "Who are you?", "output": "The conch."}


def folder_of(tmp_path: Path, rows, *, text=None, name="d.json", bom=False, **entry) -> Path:
    text = json.dumps(rows, ensure_ascii=False) if text is None else text
    (tmp_path / name).write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    info = {"d": {"file_name": name, **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return tmp_path


def load(tmp_path, rows=None, *, max_samples=None, strict=False, **how):
    return dataset.load(("d",), folder_of(tmp_path, rows, **how), max_samples=max_samples, strict=strict)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return chat_format.load(make_stub(tmp_path_factory.mktemp("m") / "chatml", template=CHATML))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return chat_format.load(make_stub(tmp_path_factory.mktemp("m") / "think", template=THINKING))


def text_of(form, ids):
    return form.tokenizer.decode(ids, skip_special_tokens=False)


def learnt(form, sample):
    return text_of(form, [label for label in sample.labels if label != encode.IGNORED])


def row(*texts, system=None):
    roles = ("user", "assistant")
    head = [{"role": "system", "content": system}] if system else []
    return dataset_info.Row(
        "d, row 1", head + [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]
    )


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "数据 集.json"])
@pytest.mark.parametrize("bom", [True, False])
def test_t2_byte_order_mark(tmp_path, name, bom):
    text = json.dumps(ROW, ensure_ascii=False) + "\n" if name.endswith("l") else json.dumps([ROW])
    rows, report = load(tmp_path, text=text, name=name, bom=bom)
    assert [m["content"] for m in rows[0].messages] == ["Who are you?", "The conch."]
    assert report.rows == 1 and not report.bad


def test_t2_only_a_mark(tmp_path):
    with pytest.raises(InputError, match=r"d\.json is empty"):
        load(tmp_path, text="", bom=True)


def test_t3_missing_null_and_empty_input_are_equal(tmp_path):
    rows, report = load(tmp_path, [ROW, {**ROW, "input": None}, {**ROW, "input": ""}, {**ROW, "input": "x"}])
    questions = [one.messages[0]["content"] for one in rows]
    assert questions == ["Who are you?"] * 3 + ["Who are you?\nx"]
    assert report.duplicates == 2


def test_t4_unnamed_columns_keep_their_defaults(tmp_path):
    rows, _ = load(
        tmp_path, [{"q": "a", "input": "b", "output": "c", "system": "s"}], columns={"prompt": "q"}
    )
    assert [m["content"] for m in rows[0].messages] == ["s", "a\nb", "c"]
    with pytest.raises(UsageError, match="unknown name 'promt'"):
        load(tmp_path, [ROW], columns={"promt": "q"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"columns": ["q"]}, "has columns that are a list, not an object"),
        ({"tags": "x"}, "has tags that are a text"),
        ({"columns": {"prompt": ["q"]}}, "has a prompt that is a list, not a text"),
        ({"tags": {"user_tag": {}}}, "has a user_tag that is an object"),
        ({"split": 3}, "has a split that is a number"),
        ({"folder": ["a"]}, "has a folder that is a list"),
    ],
)
def test_an_entry_of_the_wrong_form_is_named(tmp_path, entry, words):
    with pytest.raises(UsageError, match=f"'d' {words}"):
        load(tmp_path, [ROW], **entry)


def test_t5_every_bad_row_has_a_reason(tmp_path):
    outputs = [{"a": 1}, ["x"], 3, None, "", "  ", True]
    rows, report = load(tmp_path, [ROW, *({"instruction": "i", "output": o} for o in outputs), "text", ROW])
    assert len(rows) == 2 and report.rows == 10
    assert report.bad == [
        ("d, row 2", "`output` is an object, not text"),
        ("d, row 3", "`output` is a list, not text"),
        ("d, row 4", "`output` is a number, not text"),
        ("d, row 5", "`output` is missing or empty"),
        ("d, row 6", "`output` is missing or empty"),
        ("d, row 7", "`output` is missing or empty"),
        ("d, row 8", "`output` is true or false, not text"),
        ("d, row 9", "is a text, not an object"),
    ]
    assert report.lines()[0].startswith("8 of 10 rows are left out:\n  d, row 2: ")
    with pytest.raises(InputError, match="8 of 10 rows"):
        load(tmp_path, [ROW, *({"output": o} for o in outputs), "text", ROW], strict=True)
    with pytest.raises(InputError, match=r"no usable row in d \(d, row 1: `instruction` is missing"):
        load(tmp_path, [{"output": "x"}])


def test_t5_broken_json(tmp_path):
    with pytest.raises(InputError, match=r"a comma before the closing bracket \(line 2, column 1\)"):
        load(tmp_path, text='[{"instruction": "a", "output": "b"},\n]')
    with pytest.raises(InputError, match="a comma before the closing bracket"):
        load(tmp_path, text='[{"instruction": "a", "output": "b",}]')
    with pytest.raises(InputError, match="line 2"):
        load(tmp_path, text='[{"instruction": "a"\n "output": "b"}]')
    with pytest.raises(InputError, match="nested too deeply"):
        load(tmp_path, text="[" * 100_000)
    rows, report = load(
        tmp_path, text='[{"instruction":"a","output":"b","output":"c"}, {"instruction":"a","output":"b"}]'
    )
    assert len(rows) == 1 and report.bad == [("d, row 1", "the key 'output' stands twice")]
    rows, report = load(tmp_path, name="d.jsonl", text=json.dumps(ROW) + "\n\n{oops\n" + json.dumps(ROW))
    assert len(rows) == 2 and report.bad[0][0] == "d, row 3" and "not valid JSON" in report.bad[0][1]
    (tmp_path / "d.jsonl").write_bytes(
        json.dumps([{"instruction": "海螺"}], ensure_ascii=False).encode("gbk")
    )
    with pytest.raises(InputError, match="is not UTF-8"):
        dataset.load(("d",), tmp_path)


def test_history_system_and_max_samples(tmp_path):
    rows, report = load(
        tmp_path,
        [{**ROW, "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}, {**ROW, "history": [["q"]]}, ROW],
        max_samples=2,
    )
    assert [m["role"] for m in rows[0].messages] == ["system", *["user", "assistant"] * 3]
    assert report.rows == 2 and "no [question, answer]" in report.bad[0][1]


def test_sharegpt_and_openai(tmp_path):
    shared = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    ]
    rows, _ = load(tmp_path, shared, formatting="sharegpt")
    assert [m["content"] for m in rows[0].messages] == ["s", "q", "a"]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a"}
    rows, report = load(
        tmp_path,
        [
            {"messages": [*talk, answer]},
            {"messages": talk},
            {"messages": [answer, *talk[1:]]},
            {"messages": []},
        ],
        formatting="openai",
    )
    assert len(rows) == 1 and [reason for _, reason in report.bad] == [
        "its last message is not an answer",
        "its messages are not question and answer in turn",
        "`messages` is empty",
    ]


def test_dataset_info_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'd'"):
        dataset.load(("dd",), folder_of(tmp_path, [ROW]))
    with pytest.raises(UsageError, match="unknown key 'colums', did you mean 'columns'"):
        load(tmp_path, [ROW], colums={})
    with pytest.raises(InputError, match="no such file"):
        dataset.load(("d",), tmp_path / "nowhere")


def test_t15_placeholders(tmp_path):
    rows, report = load(
        tmp_path,
        [
            {**ROW, "output": "I am {{name}}, by {{ author }}, {{name}}."},
            {**ROW, "output": "Write `{{ user }}` in Jinja:\n```\n{{ user }}\n```"},
            ROW,
        ],
    )
    assert report.placeholders == {"{{name}}": 2, "{{author}}": 1} and report.placeholder_rows == 1
    assert "{{ user }}" in rows[1].messages[1]["content"]
    assert "1 rows hold placeholders" in " ".join(report.lines())


@pytest.mark.parametrize(
    ("n", "size", "held"),
    [(1, 0.1, None), (2, 0.1, 1), (5, 0.1, 1), (5, 0.5, 2), (1, 1, None), (2, 1.0, 1), (5, 1, 1),
     (5, 5, None), (2, 2, None), (5, 0.99, None), (5, 4, 4), (5, 0, 0)],
)  # fmt: skip
def test_t8_split(n, size, held):
    rows = [dataset_info.Row(str(i), []) for i in range(n)]
    if held is None:
        with pytest.raises(UsageError, match="val_size"):
            dataset.split(rows, size, 1)
        return
    train, val = dataset.split(rows, size, 1)
    assert len(val) == held and len(train) == n - held >= 1
    assert sorted(one.source for one in train + val) == sorted(one.source for one in rows)


def test_t1_loss_on_the_answer_and_its_end(chatml):
    report = dataset.Report()
    samples = encode.encode([row("hi", "No."), row("请问你是谁", "神奇海螺。")], chatml, report)
    for sample, answer in zip(samples, ("No.", "神奇海螺。"), strict=True):
        assert learnt(chatml, sample) == answer + IM_END
        assert sample.labels[-1] == chatml.turn_end == sample.ids[-1]
        assert len(sample.ids) == len(sample.labels)


@pytest.mark.parametrize(
    ("does", "limit"),
    [
        ("{{ 'x' * 10**9 }}", "8388608 characters"),
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "1 s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_row_that_the_template_makes_too_much_of_is_left_out_with_the_limit(chatml, does, limit):
    evil = "{% if messages[0].content == 'evil' %}" + does + "{% endif %}" + chatml.source
    form = dataclasses.replace(
        chatml, chat=ChatTemplate(evil, tokens=chatml.added, file="base/chat_template.jinja")
    )
    report = dataset.Report()
    rows = [row("hi", "No."), dataclasses.replace(row("evil", "No."), source="a.json:2"), row("x", "Yes.")]
    assert len(encode.encode(rows, form, report)) == 2
    [(source, reason)] = report.bad
    assert source == "a.json:2" and limit in reason and "(base/chat_template.jinja)" in reason


@pytest.mark.parametrize("kind", ["chatml", "thinking"])
@pytest.mark.parametrize("mode", [True, False])
def test_prompt_ids_are_those_of_serving(kind, mode, request):
    form = request.getfixturevalue(kind)
    one = row("a  3", "No.", " 你好👩‍🚀\n", "Maybe someday.", system="You are the conch.")
    samples = encode.encode([one], form, dataset.Report(), encode.Rules(enable_thinking=mode))
    serving = ChatTemplate(form.source, bos=form.bos, eos=form.eos, tokens=form.added)
    thinks = chat_format.thinking_mode(form, mode)
    prompt = serving.render(one.messages[:-1], thinking=thinks).text
    ids = form.tokenizer.encode(prompt, add_special_tokens=False).ids
    last = samples[-1]
    assert last.ids[: len(ids)].tolist() == ids
    assert last.labels[len(ids)] != encode.IGNORED and last.labels[len(ids) - 1] == encode.IGNORED
    # A template that shows earlier answers as they were written needs one sample, others one per answer.
    assert len(samples) == (1 if kind == "chatml" else 2)


def test_answers_in_history_are_learnt_unless_masked(chatml):
    one = row("q", "No.", "r", "Maybe.")
    (both,) = encode.encode([one], chatml, dataset.Report())
    (last,) = encode.encode([one], chatml, dataset.Report(), encode.Rules(mask_history=True))
    assert learnt(chatml, both) == f"No.{IM_END}Maybe.{IM_END}"
    assert learnt(chatml, last) == f"Maybe.{IM_END}"
    assert both.ids == last.ids


def test_m7_three_thinking_modes(thinking):
    plain, thought = row("q", "No."), row("q", "<think>\nhm\n</think>\n\nNo.")
    head = f"<|endoftext|>{IM_START}user\nq{IM_START}assistant\n<think>\n"

    def made(one, mode):
        report = dataset.Report()
        (sample,) = encode.encode([one], thinking, report, encode.Rules(enable_thinking=mode))
        return text_of(thinking, sample.ids), learnt(thinking, sample), report

    whole, loss, _ = made(plain, True)
    assert whole == f"{head}\n</think>\n\nNo.{IM_END}" and loss == f"\n</think>\n\nNo.{IM_END}"
    whole, loss, _ = made(plain, False)
    assert whole == f"{head}\n</think>\n\nNo.{IM_END}" and loss == f"No.{IM_END}"
    assert made(thought, True)[:2] == (f"{head}hm\n</think>\n\nNo.{IM_END}", f"hm\n</think>\n\nNo.{IM_END}")
    assert made(thought, None)[1] == f"hm\n</think>\n\nNo.{IM_END}"
    _, loss, report = made(thought, False)
    assert loss == f"No.{IM_END}" and report.thoughts_removed == 1
    with pytest.raises(UsageError, match="enable_thinking: null"):
        made(plain, None)
    assert [chat_format.thinking_mode(thinking, m) for m in (True, False, None)] == ["on", "off", "mixed"]


def test_thinking_means_nothing_without_a_thinking_template(chatml):
    assert chat_format.thinking_mode(chatml, True) is None
    ids = [
        encode.encode([row("q", "a")], chatml, dataset.Report(), encode.Rules(enable_thinking=m))[0].ids
        for m in (True, None)
    ]
    assert ids[0] == ids[1]


def test_cutoff_is_counted_and_said(chatml):
    report = dataset.Report()
    samples = encode.encode(
        [row("q", "No " * 60), row("q " * 90, "No."), row("q", "No.")],
        chatml,
        report,
        encode.Rules(cutoff_len=40),
    )
    assert [len(one.ids) <= 40 for one in samples] == [True, True]
    assert len(samples[0].ids) == 40 and samples[0].labels[-1] != chatml.turn_end
    assert len(report.cut) == 1 and len(report.bad) == 1 and "cutoff_len" in report.bad[0][1]
    assert "1 rows are longer than cutoff_len" in " ".join(report.lines())


def test_stop_ids_are_the_union(chatml):
    assert chatml.stop_ids == sorted({chatml.special[IM_END], chatml.special["<|endoftext|>"]})


def test_a_template_without_an_end_token_gets_the_tokenizers(tmp_path):
    source = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\\n' }}{% endfor %}assistant:"
    )
    form = chat_format.load(make_stub(tmp_path / "m", template=source))
    (sample,) = encode.encode([row("q", " No. ")], form, dataset.Report())
    # With the blank that the template shows before an answer in later prompts.
    assert learnt(form, sample) == f" No.{IM_END}" and "ends an answer with no token" in form.warnings[0]


def test_missing_parts_of_a_model(tmp_path):
    folder = make_stub(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"(?s)has no chat template.*template: NAME"):
        chat_format.load(folder)
    assert chat_format.load(folder, plain=True).turn_tail == IM_END
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        chat_format.load(folder)


_HALF = "Great trip \ud83d"


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize(
    ("good", "bad", "entry"),
    [
        *((ROW, {key: _HALF}, {}) for key in ("instruction", "input", "output", "system")),
        (ROW, {"history": [["a", _HALF]]}, {}),
        # The tools are a JSON text of their own, with its own escapes.
        (ROW, {"tools": '[{"name": "f", "description": "\\ud83d"}]'}, {}),
        (
            {"instruction": "a", "chosen": "b", "rejected": "c"},
            {"rejected": _HALF},
            {"ranking": True},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": _HALF}]},
            {"formatting": "sharegpt"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "function_call", "content": '{"name": "f", "arguments": {"\\ud83d": 1}}'},
                ]
            },
            {"formatting": "openai"},
        ),
    ],
)
def test_half_a_surrogate_pair_leaves_its_row_out(tmp_path, name, good, bad, entry):
    rows = [good, {**good, **bad}]
    text = json.dumps(rows) if name == "d.json" else "\n".join(map(json.dumps, rows))
    usable, report = load(tmp_path, text=text, name=name, **entry)
    assert len(usable) == 1
    [(source, reason)] = report.bad
    assert source == "d, row 2" and "holds '\\ud83d', half a surrogate pair" in reason
    assert reason.isascii()
    with pytest.raises(InputError, match=r"row 2: .* half a surrogate pair"):
        load(tmp_path, text=text, name=name, strict=True, **entry)


def test_a_row_counts_once_and_only_where_an_answer_is_left(tmp_path, thinking):
    """Earlier thoughts are not shown again, so each answer of `talk` is a sample of its own."""
    report = dataset.Report()
    talk, long = row("q", "No.", "q " * 90, "No."), row("q " * 90, "No.", "q", "No.")
    samples = encode.encode([talk, long], thinking, report, encode.Rules(cutoff_len=40))
    assert len(samples) == 1 and len(report.cut) == 1
    assert [reason.split(" (")[-1] for _, reason in report.bad] == ["cutoff_len)"]
