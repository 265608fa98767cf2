"""Files of every kind row by row, dataset_info.json in full, and what `edge data` shows."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from convert.config import parse
from convert.data import cli, dataset, dataset_info, encode, read_files
from convert.data.dataset_info import read_info
from convert.model import chat_format
from convert.model.named_templates import jinja
from edge.errors import InputError, UsageError
from edge.server.conversation import Conversation, PreparedChat
from edge.server.tool_dialects import Tool
from tests.support.tool_templates import DISTILL
from tests.support.toy import IM_END, make_stub

ROW = {"instruction": "Who are you?", "output": "The conch."}
# As Qwen's: the tools in front, a call as JSON between tags.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<tool_call>' + c.function.name + ' '"
    " + (c.function.arguments | tojson) }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}


def load(folder: Path, name: str = "d.json", **entry):
    (folder / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": name, **entry}}), encoding="utf-8"
    )
    return dataset.load(("d",), folder)


def texts(found):
    return [[message["content"] for message in one.messages] for one in found]


@pytest.mark.slow
def test_csv_and_parquet_are_the_same_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = '\ufeffinstruction,input,output\n"多行\n问题",,"a, ""b"""\nq,x,y\nonly,two\n'
    (tmp_path / "d.csv").write_text(lines, encoding="utf-8")
    found, report = load(tmp_path, "d.csv")
    assert texts(found) == [["多行\n问题", 'a, "b"'], ["q\nx", "y"]]
    assert report.bad == [("d, row 5", "has another number of fields than the 3 of the first line")]
    (tmp_path / "d.csv").write_text('"instruction"x,output\nq,a\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"d\.csv, line 1: not valid CSV"):
        load(tmp_path, "d.csv")
    table = {"instruction": ["多行\n问题", "q"], "input": [None, "x"], "output": ['a, "b"', "y"]}
    parquet.write_table(arrow.table(table), tmp_path / "d.parquet")
    again, _ = load(tmp_path, "d.parquet")
    assert texts(again) == texts(found)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"d\.parquet cannot be read"):
        load(tmp_path, "d.parquet")


def test_a_folder_and_its_split(tmp_path):
    folder = tmp_path / "many 行"
    folder.mkdir()
    for name in ("train-1", "train-2", "test"):
        row = {**ROW, "instruction": name}
        (folder / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    found, _ = load(tmp_path, "many 行")
    assert [one[0] for one in texts(found)] == ["train-1", "train-2"]
    assert [one.source for one in found] == ["d, row 1", "d, row 2"]
    found, _ = load(tmp_path, "many 行", split="test")
    assert [one[0] for one in texts(found)] == ["test"]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_list_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(read_files, "_CHUNK", chunk)
    values = [{"a": '海螺 " ] } ,', "b": [1, 2.5e3]}, {}, {"c": {"d": None}}, "text", 12345]
    path = tmp_path / "d.json"
    path.write_text(
        "\n [" + ",\n".join(json.dumps(one, indent=1) for one in values) + " ]\n", encoding="utf-8"
    )
    assert list(read_files.read(path)) == list(enumerate(values, 1))
    for text, words in (
        ('[{"a": 1}', "is cut off: its list has no end, after 1 rows"),
        ('[{"a": 1}, {"b"', r"not valid JSON: .*\(line 1, column 1"),
        ('[{"a": 1} {}]', r"Expecting ',' delimiter \(line 1, column 11\)"),
        ('[{"a": 1}]\n{}', r"Extra data \(line 2, column 1\)"),
        ('[\n\n  {"a": x}]', r"Expecting value \(line 3, column 9\)"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            list(read_files.read(path))
    path.write_text("[]", encoding="utf-8")
    assert list(read_files.read(path)) == []


def test_preference_rows_of_each_format(tmp_path):
    given = [
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "chosen": "a", "rejected": "a"},
        {"instruction": "q", "chosen": "a", "rejected": 3},
        {"instruction": "q", "chosen": "", "rejected": "b"},
    ]
    (tmp_path / "d.json").write_text(json.dumps(given), encoding="utf-8")
    found, report = load(tmp_path, ranking=True)
    assert [(texts([one])[0], one.chosen, one.rejected) for one in found] == [(["q\nx"], "a", "b")]
    assert [reason for _, reason in report.bad] == [
        "its chosen and its rejected answer are the same",
        "`rejected` is a number, not an answer",
        "`chosen` is empty",
    ]
    talk = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    answered = {**talk, "conversations": [*talk["conversations"], {"from": "gpt", "value": "x"}]}
    (tmp_path / "d.json").write_text(json.dumps([talk, answered]), encoding="utf-8")
    found, report = load(tmp_path, ranking=True, formatting="sharegpt")
    assert (found[0].chosen, found[0].rejected) == ("a", "b")
    assert report.bad[0][1] == "its last message is no question for the chosen and the rejected answer"


def test_pairs_have_loss_on_both_answers_alone(tmp_path):
    form = chat_format.load(make_stub(tmp_path / "m"))
    row = dataset_info.Row("r", [{"role": "user", "content": "q"}], None, "good", "bad")
    (pair,) = encode.pairs([row], form, dataset.Report(), encode.Rules())
    for sample, answer in ((pair.chosen, "good"), (pair.rejected, "bad")):
        ids = [label for label in sample.labels if label != encode.IGNORED]
        assert form.tokenizer.decode(ids, skip_special_tokens=False) == answer + IM_END
    report = dataset.Report()
    long = dataset_info.Row("r", [{"role": "user", "content": "q " * 90}], None, "good", "bad")
    assert not list(encode.pairs([long, row], form, report, encode.Rules(cutoff_len=30)))[1:]
    assert report.bad == [("r", "its prompt alone has 30 tokens or more (cutoff_len)")]


def test_tool_calls_are_learnt_as_the_template_writes_them(tmp_path):
    talk = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "上海"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    bad = {
        **talk,
        "conversations": [talk["conversations"][0], {"from": "function_call", "value": "weather()"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([talk, bad]), encoding="utf-8")
    found, report = load(tmp_path, formatting="sharegpt")
    assert [one["role"] for one in found[0].messages] == ["user", "assistant", "tool", "assistant"]
    assert report.bad == [("d, row 2", "message 2 is no tool call with a name and an object of arguments")]
    form = chat_format.load(make_stub(tmp_path / "m", template=TOOLS))
    (sample,) = encode.encode(found, form, dataset.Report())
    learnt = [label for label in sample.labels if label != encode.IGNORED]
    said = form.tokenizer.decode(learnt, skip_special_tokens=False)
    assert said == f'<tool_call>weather {{"city": "上海"}}{IM_END}No.{IM_END}'
    whole = form.tokenizer.decode(list(sample.ids), skip_special_tokens=False)
    assert '"description": "d"' in whole and "tool\nsun" in whole
    plain = chat_format.load(make_stub(tmp_path / "plain"))
    report = dataset.Report()
    assert encode.encode(found, plain, report) == []
    assert "does not show tools" in report.bad[0][1]


@pytest.mark.slow
def test_the_hub_is_asked_with_subset_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, **how):
        asked.append((path, how))
        return [ROW, ROW]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    info = {"d": {"hf_hub_url": "me/rows", "ms_hub_url": "x", "subset": "zh", "split": "test", "folder": "f"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    found, _ = dataset.load(("d",), tmp_path)
    how = {"name": "zh", "data_dir": "f", "split": "test", "streaming": True}
    assert len(found) == 2 and asked == [("me/rows", how)]
    with pytest.raises(UsageError, match=r"(?s)REMOTE:me/data.*hf download --repo-type dataset me/data"):
        read_info("REMOTE:me/data", ("d",))
    entry = read_info("ONLINE", ("me/other",))["me/other"]
    assert list(entry.rows()) == [(1, ROW), (2, ROW)] and asked[1][0] == "me/other"

    def gone(path, **how):
        raise FileNotFoundError("no such data set\nmore")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(InputError, match="cannot be read from the hub: no such data set"):
        dataset.load(("d",), tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"script_url": "x"}, "has only script_url, which is not supported: its code is never run"),
        ({}, "has neither file_name nor a hub_url"),
        ({"file_name": "x", "formatting": "xml"}, "has formatting 'xml'"),
        ({"file_name": "x", "ranking": "yes"}, "has ranking 'yes'"),
        ({"file_name": "x", "num_samples": 0}, "has num_samples 0"),
        ({"file_name": "x", "tags": {"role": "x"}}, "has tags with the unknown name 'role'"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path, entry, words):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}), encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        dataset.load(("d",), tmp_path)


def test_edge_data_shows_it_all(tmp_path):
    given = [
        ROW, ROW, {"instruction": "x", "output": None}, {**ROW, "output": "I am {{name}}. 我是海螺"},
        {**ROW, "output": "No " * 200},
    ]  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(given), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    config = parse(
        {
            "model_name_or_path": str(make_stub(tmp_path / "m")),
            "dataset": "d",
            "dataset_dir": str(tmp_path),
            "output_dir": "o",
            "cutoff_len": 64,
        }
    )
    said = Console(record=True, width=200, force_terminal=True, color_system="truecolor")
    cli.show(config, said, rows=1)
    coloured = said.export_text(styles=True, clear=False)
    text = said.export_text()
    for words in (
        "d: 5 rows read, 1 left out, 4 rows to train on, 0 held out",
        "d, row 3: `output` is missing or empty",
        "1 rows are duplicates of an earlier one; they are kept (first: d, row 2 is d, row 1)",
        "1 rows hold placeholders that nothing fills in: {{name}} x 1 (first: d, row 4)",
        "1 rows are cut; policy: an answer that passes cutoff_len is cut at its end",
        "longest 64",
        "<- cutoff_len",
        "d, row 1: ",
    ):
        assert words in text, words
    assert "\x1b[30;102m" in coloured and "\x1b[2m" in coloured


def test_the_picture_counts_every_row():
    lines = cli.histogram([10, 10, 11, 40, 400], 64)
    counts = [int(line.split("  <-")[0].split()[-1]) for line in lines[:-1]]
    assert sum(counts) == 5 and counts[0] == 4 and counts[-1] == 1
    assert lines[-1] == "median and more: 50 % 11, 90 % 400, 99 % 400, longest 400"
    assert cli.histogram([7], 8) == [
        "7 - 7  " + "█" * 40 + " 1",
        lines[-1].replace("11", "7").replace("400", "7"),
    ]


@pytest.mark.parametrize(("val_size", "seed", "counts"), [(0, 4, (2, 0)), (1, 4, (1, 1)), (1, 42, (2, 0))])
def test_rows_beyond_cutoff_len_are_not_counted_as_trained(tmp_path, val_size, seed, counts):
    given = [ROW, {"instruction": "Why " * 200, "output": "No."}, {**ROW, "output": "Maybe."}]
    (tmp_path / "d.json").write_text(json.dumps(given), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    config = parse(
        {
            "model_name_or_path": str(make_stub(tmp_path / "m")),
            "dataset": "d",
            "dataset_dir": str(tmp_path),
            "output_dir": "o",
            "cutoff_len": 64,
            "val_size": val_size,
            # Of 4 the held-out row is the last, of 42 the one that is left out.
            "seed": seed,
        }
    )
    said = Console(record=True, width=200)
    cli.show(config, said, rows=0)
    rows, held = counts
    assert f"3 rows read, 1 left out, {rows} rows to train on, {held} held out" in said.export_text()


@pytest.mark.slow
def test_a_parquet_text_that_is_no_utf8_leaves_its_row_out(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = arrow.StringArray.from_buffers(2, *arrow.array([b"good", b"\xed\xa0\xbd"]).buffers()[1:])
    parquet.write_table(arrow.table({"a": texts}), tmp_path / "d.parquet")
    (_, good), (number, bad) = read_files.read(tmp_path / "d.parquet")
    assert good == {"a": "good"} and number == 2
    assert isinstance(bad, read_files.BadRow) and "not UTF-8" in str(bad)


# Rows as in the demo files of LLaMA-Factory's data folder, and what comes of them.
_CALL = '{"name": "weather", "arguments": {"city": "\u5317\u4eac"}}'


@pytest.mark.parametrize(
    ("row", "entry", "roles"),
    [
        # glaive_toolcall_zh_demo
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": _CALL},
                    {"from": "observation", "value": "{}"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps([WEATHER]),
            },
            {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
            "user assistant tool assistant",
        ),
        # The same with two calls at once, as their list or one after the other.
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": f"[{_CALL}, {_CALL}]"},
                    {"from": "observation", "value": "{}"},
                    {"from": "observation", "value": "{}"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps([WEATHER]),
            },
            {"formatting": "sharegpt"},
            "user assistant tool tool assistant",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": _CALL},
                    {"from": "function_call", "value": _CALL},
                    {"from": "observation", "value": "{}"},
                    {"from": "observation", "value": "{}"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps([WEATHER]),
            },
            {"formatting": "sharegpt"},
            "user assistant tool tool assistant",
        ),
        # kto_en_demo
        (
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "label": False,
            },
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "kto_tag": "label"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
            "user assistant",
        ),
        # alpaca_zh_demo with history, and keys that nothing asks for.
        (
            {**ROW, "system": "s", "history": [["q1", "a1"]], "id": 7, "source": "x"},
            {"columns": {"prompt": "instruction", "history": "history", "system": "system"}},
            "system user assistant user assistant",
        ),
    ],
)
def test_rows_of_the_demo_files(tmp_path, row, entry, roles):
    (tmp_path / "d.json").write_text(json.dumps([row]), encoding="utf-8")
    [found], report = load(tmp_path, **entry)
    assert not report.bad and [message["role"] for message in found.messages] == roles.split()
    assert found.good is row.get("label", True)
    calls = [message for message in found.messages if "tool_calls" in message]
    assert [len(one["tool_calls"]) for one in calls] == ([roles.count("tool")] if calls else [])


def test_a_thought_stands_before_a_call(tmp_path):
    """Written behind it, or between tags; without one an empty thought is learnt, as before any answer."""
    texts = [f"<think>\nt\n</think>\n\n{_CALL}", f"<think>t</think><tool_call>{_CALL}</tool_call>", _CALL]
    rows = [
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}],
            "tools": json.dumps([WEATHER]),
        }
        for text in texts
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    found, report = load(tmp_path, formatting="sharegpt")
    assert not report.bad and all(len(row.messages[1]["tool_calls"]) == 1 for row in found)
    form = chat_format.load(make_stub(tmp_path / "m", template=jinja("qwen3")))
    call = f"<tool_call>\n{_CALL}\n</tool_call>{IM_END}"

    def learnt(mode):
        samples = encode.encode(found, form, report, encode.Rules(enable_thinking=mode))
        return [
            form.tokenizer.decode(one.ids[slice(*one.spans[0])], skip_special_tokens=False) for one in samples
        ]

    thought, empty = "<think>\nt\n</think>\n\n", "<think>\n\n</think>\n\n"
    assert learnt(True) == [thought + call, thought + call, empty + call]
    assert learnt(False) == [call] * 3 and report.thoughts_removed == 2
    assert learnt(None) == [thought + call, thought + call, call]


def test_tools_are_trained_on_as_they_are_served(tmp_path):
    """DeepSeek's distills have no place for definitions, read arguments as text, and open every thought."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]
    rows = [{"messages": talk, "tools": [{"type": "function", "function": WEATHER}]}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    [row], report = load(tmp_path, formatting="openai")
    calls, answer = "{% endfor %}{% endif %}{% if m['role']", "<｜Assistant｜>{{ m['content'] }}"
    opened = (
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% else %}{# </think> #}{% endif %}"
    )
    template = DISTILL.removesuffix("<｜Assistant｜>").replace(answer, answer + IM_END) + opened
    template = template.replace(calls, f"{{% endfor %}}<｜tool▁calls▁end｜>{IM_END}" + calls[12:])
    form = chat_format.load(make_stub(tmp_path / "m", template=template))
    model = SimpleNamespace(template=lambda: form.chat, thinking="on", reasons=True, name="m")
    samples = encode.encode([row], form, report)
    assert not report.bad
    written = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "北京"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )
    for sample, asked, answer in zip(samples, (talk[:1], talk[:3]), (written, "Sunny."), strict=True):
        prompt = PreparedChat(model, Conversation(asked, [Tool(**WEATHER)])).prompt.text
        text = form.tokenizer.decode(sample.ids, skip_special_tokens=False)
        assert "weather" in prompt and text == f"{prompt}\n</think>\n\n{answer}{IM_END}"


def test_tools_that_the_template_does_not_show_leave_their_row_out(tmp_path):
    rows = [{**ROW, "tools": json.dumps([WEATHER])}, ROW]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    found, report = load(tmp_path)
    assert len(encode.encode(found, chat_format.load(make_stub(tmp_path / "m")), report)) == 1
    assert report.bad == [
        ("d, row 1", "the model's chat template does not show tools (template: NAME gives it one)")
    ]


def test_parallel_calls_are_learnt_as_the_template_writes_them(tmp_path):
    """Two calls and two answers in OpenAI's form: one turn each, its ids those of the whole text."""
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q", "name": "someone"},
                {"role": "assistant", "content": None, "tool_calls": [call, call]},
                {"role": "tool", "content": "x", "tool_call_id": "1"},
                {"role": "tool", "content": "y", "tool_call_id": "2"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        }
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    found, report = load(tmp_path, formatting="openai")
    form = chat_format.load(make_stub(tmp_path / "m", template=TOOLS))
    [sample] = encode.encode(found, form, report)
    assert not report.bad
    whole = form.tokenizer.decode(sample.ids, skip_special_tokens=False)
    assert whole.count("<tool_call>weather {}") == 2 and "tool\nx" in whole and "tool\ny" in whole
    learnt = [form.tokenizer.decode(sample.ids[a:b], skip_special_tokens=False) for a, b in sample.spans]
    assert learnt == [f"<tool_call>weather {{}}<tool_call>weather {{}}{IM_END}", f"a{IM_END}"]


def test_rows_that_a_method_cannot_learn_from(tmp_path):
    """Each with its reason: a system message in the middle, roles out of order, plain text, bad answers."""
    human, gpt, system = ({"from": role, "value": "x"} for role in ("human", "gpt", "system"))
    rows = [[human, gpt], [human, gpt, system, human, gpt], [gpt, human], [human, human, gpt], [system, gpt]]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": one} for one in rows]), encoding="utf-8")
    found, report = load(tmp_path, formatting="sharegpt")
    turns = "its messages are not question and answer in turn"
    assert len(found) == 1 and [reason for _, reason in report.bad] == [
        "it has a system message that is not its first message",
        turns,
        turns,
        turns,
    ]
    (tmp_path / "d.json").write_text(
        json.dumps([ROW, {"text": "t"}, {**ROW, "kto_tag": False}]), encoding="utf-8"
    )
    found, report = load(tmp_path)
    assert len(found) == 1 and [reason for _, reason in report.bad] == [
        "is plain text, which stage: pt learns from",
        "`kto_tag` is false: its answer is a bad one, which stage: kto alone learns from",
    ]
    (tmp_path / "d.json").write_text(json.dumps([{**ROW, "label": "no"}, ROW]), encoding="utf-8")
    with pytest.raises(InputError, match=r"`label` is a text, neither .*; d, row 2: `label` is null"):
        load(tmp_path, columns={"kto_tag": "label"})
    with pytest.raises(UsageError, match="has both ranking and kto_tag"):
        load(tmp_path, columns={"kto_tag": "label"}, ranking=True)


def test_blank_lines_and_line_ends_of_windows(tmp_path):
    lines = f"\r\n{json.dumps(ROW)}\r\n\r\n   \r\n{json.dumps(ROW)}\r\n\r\n"
    (tmp_path / "d.jsonl").write_bytes(lines.encode())
    found, report = load(tmp_path, "d.jsonl")
    assert [one.source for one in found] == ["d, row 2", "d, row 5"] and not report.bad
    (tmp_path / "d.csv").write_bytes(b'instruction,output,note\r\n\r\n"a ""b""","c\r\nd",x\r\n\r\n')
    found, report = load(tmp_path, "d.csv")
    assert texts(found) == [['a "b"', "c\r\nd"]] and not report.bad


def test_plain_text_files(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeff第一行\r\n\r\n two \n".encode())
    assert list(read_files.read(tmp_path / "d.txt")) == [(1, {"text": "第一行"}), (3, {"text": " two "})]
    with pytest.raises(
        InputError,
        match=r"(?s)d, row 1: is plain text, which stage: pt learns from.*\n.*train with stage: pt",
    ):
        load(tmp_path, "d.txt")
    with pytest.raises(InputError, match=r"(?s)has no `output`: text alone is .*\n.*train with stage: pt"):
        load(tmp_path, "d.txt", columns={"prompt": "text"})


@pytest.mark.parametrize("name", ["d.json", "d.csv", "d.txt", "dataset_info.json"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, name, encoding, monkeypatch):
    if encoding in ("utf-16-le", "utf-16-be") and name != "d.json":
        return  # without a mark only JSON shows it
    text = '{"d": {"file_name": "神奇海螺.json"}}' if "info" in name else '[{"instruction": "神奇海螺"}]'
    if name != "dataset_info.json":
        (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": name}}), encoding="utf-8")
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=f"is not UTF-8, but by its bytes {encoding.upper()}") as caught:
        dataset.load(("d",), tmp_path)
    # The command itself, without a new interpreter.
    _, code, words = caught.value.hint.split('"')
    monkeypatch.setattr("sys.argv", ["-c", *shlex.split(words)])
    exec(code, {})
    assert path.with_name(f"{path.stem}-utf8{path.suffix}").read_text(encoding="utf-8") == text


def test_bytes_that_are_no_encoding_are_not_guessed(tmp_path):
    (tmp_path / "d.json").write_bytes('[{"instruction": "café \xff"}]'.encode("latin-1"))
    with pytest.raises(InputError, match=r"d\.json is not UTF-8: .* position"):
        load(tmp_path)
