"""dataset_info.json: where a data set is, and how its rows become messages.

alpaca, sharegpt and openai rows, preference rows (ranking) of each; tools and their calls.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.data import read_files
from convert.data.read_files import BadRow, Twice
from convert.model import modelscope
from convert.model.hf_folder import shell
from edge.errors import InputError, UnavailableError, UsageError
from edge.reasoning import THINK_END
from edge.setup import install_command

INFO = "dataset_info.json"
ONLINE = "ONLINE"
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_HALF = re.compile(r"[\ud800-\udfff]")

_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "messages": "conversations",
    "history": "history", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "kto_tag", "images": "images", "videos": "videos", "audios": "audios",
}  # fmt: skip
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_KEYS = (
    "file_name", "file_sha1", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
    "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. source: "name, row N" (from 1; in .jsonl and .csv the line).

    messages end with an answer, or, in a preference row, with the question that `chosen` and `rejected`
    answer. tools: what the model may call, as OpenAI's API lists it. good: whether the answer is one to learn
    or one to avoid (kto_tag). Plain text is one message of the role "text".
    """

    source: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    chosen: str = ""
    rejected: str = ""
    good: bool = True


def read_info(folder: str, names: tuple[str, ...], *, plain: bool = False) -> dict[str, Entry]:
    """The entries of `names` in folder/dataset_info.json; with the folder ONLINE the names are hub ids.

    plain: rows are plain text, for stage: pt.
    Raises InputError for a missing or broken file, UsageError for a name or an entry that cannot be used.
    """
    if folder == ONLINE:
        key = "ms_hub_url" if modelscope.asked() else "hf_hub_url"
        return {name: Entry.of(name, {key: name}, Path(), plain=plain) for name in names}
    path = Path(folder) / INFO
    if folder.startswith("REMOTE:"):
        name = folder.removeprefix("REMOTE:")
        raise UsageError(
            f"dataset_dir: {folder}: a folder of data sets on the hub is not read from there",
            f"hf download --repo-type dataset {shell(name)} --local-dir data, then dataset_dir: data",
        )
    if not path.is_file():
        raise InputError(f"no such file: {path}", "dataset_dir names the folder that holds dataset_info.json")
    try:
        info = read_files.parse(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise read_files.no_utf8(path, error) from error
    if not isinstance(info, dict):
        raise InputError(f"{path} is not an object of names and data sets")
    if isinstance(info, Twice):
        raise InputError(f"{path}: the data set '{info.key}' stands twice")
    for name in names:
        if name not in info:
            near = difflib.get_close_matches(name, list(info), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "it names: " + ", ".join(sorted(info)[:20])
            raise UsageError(f"{path} has no data set '{name}'", hint)
    return {name: Entry.of(name, info[name], Path(folder), plain=plain) for name in names}


def find_folder(settings: dict[str, Any], run: Path | None) -> str:
    """The dataset_dir in a run's recorded `settings`; run: a folder of that run.

    Older runs recorded it as it was given: a relative one is looked for in the folders above `run`, the
    nearest first, then in the working folder.
    """
    name = str(settings.get("dataset_dir", "data"))
    if name != ONLINE and run is not None:
        for folder in run.absolute().parents:
            if (folder / name / INFO).is_file():
                return str(folder / name)
    return name


@dataclass(frozen=True)
class Entry:
    """One data set of dataset_info.json, with every default filled in. hub: its id, or None for `path`.

    modelscope: whether the hub is ModelScope. tagged: each row says whether its answer is good (kto_tag).
    plain: rows are plain text.
    """

    name: str
    path: Path
    hub: str | None
    formatting: str
    ranking: bool
    subset: str | None
    split: str
    folder: str | None
    num_samples: int | None
    columns: dict[str, str]
    tags: dict[str, str]
    modelscope: bool = False
    tagged: bool = False
    plain: bool = False

    @classmethod
    def of(cls, name: str, entry: Any, folder: Path, *, plain: bool = False) -> Entry:
        _check(name, entry)
        file, hub, ms = (entry.get(key) for key in ("file_name", "hf_hub_url", "ms_hub_url"))
        # As LLaMA-Factory chooses: ModelScope where it is asked for, or where there is no other.
        on_ms = isinstance(ms, str) and (modelscope.asked() or not isinstance(hub, str))
        hub = ms if on_ms else hub
        if not isinstance(file, str) and not isinstance(hub, str):
            other = next((key for key in _KEYS[4:7] if entry.get(key)), None)
            if other:
                why = "its code is never run" if other == "script_url" else "other hubs are not read"
                raise _wrong(name, f"has only {other}, which is not supported: {why}")
            raise _wrong(name, "has neither file_name nor a hub_url")
        formatting, ranking = entry.get("formatting", "alpaca"), entry.get("ranking", False)
        columns, tags = _names(name, entry, openai=formatting == "openai")
        declared = entry.get("columns") or {}
        tagged = bool(declared.get("kto_tag"))
        if tagged and ranking:
            raise _wrong(name, "has both ranking and kto_tag")
        if plain:
            columns["prompt"] = declared.get("prompt") or "text"
        path = folder / file if isinstance(file, str) else folder
        use_hub = isinstance(hub, str) and not (isinstance(file, str) and path.exists())
        return cls(
            name, path, hub if use_hub else None, formatting, ranking, entry.get("subset"),
            entry.get("split") or "train", entry.get("folder"), entry.get("num_samples"), columns, tags,
            use_hub and on_ms, tagged, plain,
        )  # fmt: skip

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, value) of each row, unchecked. Raises InputError where it cannot be read."""
        path = self.path
        if self.hub is not None:
            if not self.modelscope:
                yield from _hub_rows(self)
                return
            path = modelscope.dataset(self.hub, read_files.SUFFIXES)
            if self.subset and (path / self.subset).is_dir():
                path = path / self.subset
        path = path / self.folder if self.folder and path.is_dir() else path
        files = read_files.files(path)
        word = re.compile(rf"(^|[^a-z]){re.escape(self.split.lower())}([^a-z]|$)")
        files = [file for file in files if word.search(file.stem.lower())] or files
        rows = (row for file in files for row in read_files.read(file))
        yield from rows if len(files) == 1 else enumerate((row for _, row in rows), 1)

    def row(self, source: str, raw: Any) -> Row:
        """`raw` as messages: perhaps system, then question and answer in turn. Raises BadRow."""
        row = self._row(source, raw)
        # Checked after the tools and calls are parsed: their JSON texts have escapes of their own.
        for part in (row.messages, row.tools, row.chosen, row.rejected):
            if half := _half_pair(part):
                columns = [column for column in self.columns.values() if _half_pair(raw.get(column))]
                where = f"`{columns[0]}`" if columns else "a tool or a call"
                raise BadRow(f"{where} holds {half!a}, half a surrogate pair, which is no character")
        return row

    def _row(self, source: str, raw: Any) -> Row:
        if isinstance(raw, Twice):
            raise BadRow(f"the key {raw.key!r} stands twice")
        if not isinstance(raw, dict):
            raise BadRow(f"is {kind_of(raw)}, not an object")
        for key in ("images", "videos", "audios"):
            if raw.get(self.columns[key]):
                raise BadRow(f"has {key}: only text is trained on")
        if self.plain:
            return Row(source, [{"role": "text", "content": self._plain(raw)}])
        good = self._good(raw)
        system = _text(raw, self.columns["system"])
        tools = self._tools(raw)
        turns = self._alpaca(raw) if self.formatting == "alpaca" else self._shared(raw)
        if system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        if not self.ranking:
            return Row(source, turns, tools, good=good)
        chosen, rejected = (self._preferred(raw, self.columns[key]) for key in ("chosen", "rejected"))
        if chosen == rejected:
            raise BadRow("its chosen and its rejected answer are the same")
        return Row(source, turns, tools, chosen, rejected)

    def _plain(self, raw: dict[str, Any]) -> str:
        column = self.columns["prompt"]
        text = _text(raw, column)
        if not text.strip():
            raise BadRow(f"`{column}` is missing or empty: stage: pt learns that column's text")
        return text

    def _good(self, raw: dict[str, Any]) -> bool:
        """What the row says of its answer, True where it says nothing and need not."""
        column = self.columns["kto_tag"]
        good = raw.get(column)
        if self.tagged and not isinstance(good, bool):
            raise BadRow(f"`{column}` is {kind_of(good)}, neither true nor false")
        if not self.tagged and good is False:
            raise BadRow(f"`{column}` is false: its answer is a bad one, which stage: kto alone learns from")
        return good is not False

    def _alpaca(self, raw: dict[str, Any]) -> list[Message]:
        prompt, query = (_text(raw, self.columns[key]) for key in ("prompt", "query"))
        question = "\n".join(part for part in (prompt, query) if part)
        if not question:
            if isinstance(raw.get("text"), str):
                raise BadRow("is plain text, which stage: pt learns from")
            raise BadRow(f"`{self.columns['prompt']}` is missing or empty")
        column = self.columns["response"]
        answer = "" if self.ranking else _text(raw, column)
        if not answer.strip() and not self.ranking:
            if column not in raw and self.columns["prompt"] != _COLUMNS["prompt"]:
                raise BadRow(f"has no `{column}`: text alone is what stage: pt learns from")
            raise BadRow(f"`{column}` is missing or empty")
        messages = []
        column = self.columns["history"]
        history = raw.get(column) or []
        if not isinstance(history, list):
            raise BadRow(f"`{column}` is {kind_of(history)}, not a list")
        for pair in history:
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)
            ):
                raise BadRow(f"`{column}` holds {kind_of(pair)} that is no [question, answer] of two texts")
            messages += _turn(*pair)
        return messages + (_turn(question, answer) if not self.ranking else _turn(question, "")[:1])

    def _shared(self, raw: dict[str, Any]) -> list[Message]:
        column = self.columns["messages"]
        given = raw.get(column)
        if not isinstance(given, list):
            raise BadRow(f"`{column}` is {kind_of(given)}, not a list of messages")
        if not given:
            raise BadRow(f"`{column}` is empty")
        messages = _joined([self._message(number, message) for number, message in enumerate(given, 1)])
        begin = int(messages[0]["role"] == "system")
        if any(message["role"] == "system" for message in messages[begin:]):
            raise BadRow("it has a system message that is not its first message")
        # Answers of several tools are one turn.
        turns = [
            message
            for before, message in itertools.pairwise([{"role": ""}, *messages[begin:]])
            if not before["role"] == message["role"] == "tool"
        ]
        for number, message in enumerate(turns):
            if message["role"] not in (("user", "tool"), ("assistant",))[number % 2]:
                raise BadRow("its messages are not question and answer in turn")
        if self.ranking:
            if len(turns) % 2 == 0:
                raise BadRow("its last message is no question for the chosen and the rejected answer")
        elif not turns or len(turns) % 2:
            raise BadRow("its last message is not an answer")
        return messages

    def _message(self, number: int, raw: Any) -> Message:
        if not isinstance(raw, dict):
            raise BadRow(f"message {number} is {kind_of(raw)}, not an object")
        roles = {self.tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
        roles |= {self.tags["observation_tag"]: "tool", self.tags["function_tag"]: "call"}
        tag = raw.get(self.tags["role_tag"])
        role = roles.get(tag) if isinstance(tag, str) else None
        if role is None:
            raise BadRow(f"message {number} has the role {tag!r}; known: {', '.join(roles)}")
        content = _text(raw, self.tags["content_tag"])
        if role == "assistant" and raw.get("tool_calls"):
            return {"role": role, "content": content, "tool_calls": _calls(raw["tool_calls"], number)}
        if not content.strip():
            raise BadRow(f"message {number} is empty")
        if role == "call":
            head, end, rest = content.partition(THINK_END)
            text, thought = (rest, f"{head}{end}\n\n") if end else (content, "")
            given = [_loads(part) for part in _TAGGED.findall(text)] or _loads(text)
            return {"role": "assistant", "content": thought, "tool_calls": _calls(given, number)}
        return {"role": role, "content": content}

    def _preferred(self, raw: dict[str, Any], column: str) -> str:
        value = raw.get(column)
        if isinstance(value, dict):
            value = value.get(self.tags["content_tag"])
        if not isinstance(value, str):
            raise BadRow(f"`{column}` is {kind_of(value)}, not an answer")
        if not value.strip():
            raise BadRow(f"`{column}` is empty")
        return value

    def _tools(self, raw: dict[str, Any]) -> list[dict[str, Any]] | None:
        column = self.columns["tools"]
        value = raw.get(column)
        if isinstance(value, str):
            value = _loads(value) if value.strip() else None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise BadRow(f"`{column}` is no JSON list of tools")
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        for function in (tool["function"] for tool in tools):
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRow(f"`{column}` holds a tool without a name")
        return tools


def _wrong(name: str, what: str) -> UsageError:
    return UsageError(
        f"{INFO}: '{name}' {what}",
        "it needs file_name, hf_hub_url or ms_hub_url; formatting, columns and tags may follow",
    )


def _check(name: str, entry: Any) -> None:
    """Raise UsageError where a key of an entry is unknown or its value cannot be meant."""
    if not isinstance(entry, dict):
        raise _wrong(name, "is not an object")
    for key in entry:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise _wrong(name, f"has the unknown key '{key}'{hint}")
    for key in ("subset", "split", "folder"):
        _check_text(name, key, entry.get(key))
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise _wrong(name, f"has formatting {formatting!r}; alpaca, sharegpt and openai are known")
    ranking, count = entry.get("ranking", False), entry.get("num_samples")
    if not isinstance(ranking, bool):
        raise _wrong(name, f"has ranking {ranking!r}, which is neither true nor false")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise _wrong(name, f"has num_samples {count!r}, which is no count")


def _check_text(name: str, key: str, value: Any) -> None:
    if not isinstance(value, str | None):
        raise _wrong(name, f"has a {key} that is {kind_of(value)}, not a text")


def _names(name: str, entry: dict[str, Any], *, openai: bool) -> tuple[dict[str, str], dict[str, str]]:
    """(columns, tags): the defaults of the formatting, and what the entry names instead."""
    columns = {**_COLUMNS, "messages": "messages"} if openai else dict(_COLUMNS)
    tags = dict(_OPENAI_TAGS if openai else _TAGS)
    for kind, names in (("columns", columns), ("tags", tags)):
        given = entry.get(kind) or {}
        if not isinstance(given, dict):
            raise _wrong(name, f"has {kind} that are {kind_of(given)}, not an object")
        for key, value in given.items():
            if key not in names:
                raise _wrong(name, f"has {kind} with the unknown name '{key}'; known: {', '.join(names)}")
            _check_text(name, key, value)
            names[key] = names[key] if value is None else value
    return columns, tags


def _hub_rows(entry: Entry) -> Iterator[tuple[int, Any]]:
    """Rows of a data set on the hub, by the library that knows its conventions, without holding it whole."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the data set {entry.hub} needs the package 'datasets'",
            install_command("train"),
        ) from error
    try:
        rows = datasets.load_dataset(
            entry.hub, name=entry.subset, data_dir=entry.folder, split=entry.split, streaming=True
        )
        yield from enumerate(rows, 1)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the data set {entry.hub} cannot be read from the hub: {first}",
            "check its name, subset and split; HF_ENDPOINT can name a mirror; or fetch it and name the file",
        ) from error


def _joined(messages: list[Message]) -> list[Message]:
    """`messages` with calls that follow one another as one turn with several calls."""
    joined: list[Message] = []
    for message in messages:
        if joined and "tool_calls" in message and "tool_calls" in joined[-1] and not message["content"]:
            calls = [*joined[-1]["tool_calls"], *message["tool_calls"]]
            joined[-1] = {**joined[-1], "tool_calls": calls}
        else:
            joined.append(message)
    return joined


def _half_pair(value: Any) -> str:
    """The first half of a surrogate pair in a JSON value, its keys included; "" without one."""
    if isinstance(value, str):
        return match[0] if (match := _HALF.search(value)) else ""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return next(filter(None, map(_half_pair, value)), "") if isinstance(value, list) else ""


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(raw: dict[str, Any], column: str) -> str:
    """The text in `column`; "" where it is missing or null. Raises BadRow for another type."""
    value = raw.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {kind_of(value)}, not text")
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(given: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as chat templates know them. Raises BadRow for one without a name or arguments."""
    calls = []
    for raw in given if isinstance(given, list) else [given]:
        call = raw.get("function", raw) if isinstance(raw, dict) else {}
        name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else ("", "")
        arguments = _loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadRow(f"message {number} is no tool call with a name and an object of arguments")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")
