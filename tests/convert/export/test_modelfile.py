"""The Modelfile says what the model's own template says, or is not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.export import modelfile
from edge.chat_template import ChatTemplate
from edge.errors import InputError
from edge.prompt import AddedTokens
from tests.support import tiny_llama
from tests.support.toy import CHATML, THINKING

# As Qwen2.5's: a system text of its own where there is none.
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are \"kind\".<|im_end|>\\n' }}{% endif %}" + CHATML
)
DISTILL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def shape(source: str) -> modelfile.Shape:
    return modelfile.take_apart(ChatTemplate(source, bos="<s>", eos="</s>", tokens=AddedTokens()), "<s>")


def test_chatml() -> None:
    found = shape(CHATML)
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.assistant == ("<|im_start|>assistant\n", "<|im_end|>\n")
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert (found.begin, found.default, found.bos) == ("<|im_start|>assistant\n", "", "")
    text = found.go()
    assert (
        '{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}' in text and "not .System" not in text
    )


def test_a_default_system_text() -> None:
    found = shape(WITH_DEFAULT)
    assert found.default == '<|im_start|>system\nYou are "kind".<|im_end|>\n'
    assert (
        '{{- if not .System }}{{ "<|im_start|>system\\nYou are \\"kind\\".<|im_end|>\\n" }}{{ end }}'
        in found.go()
    )


def test_a_distill_with_a_begin_token() -> None:
    found = shape(DISTILL)
    assert (found.user, found.assistant) == (("<｜User｜>", ""), ("<｜Assistant｜>", "</s>"))
    # Ollama adds the begin-of-text token itself: two would be one too many.
    assert found.bos == "<s>" and "<s>" not in found.go() and found.system == ("", "")
    # Where the runtime adds none, it is the template's to write, with a system text and without.
    own = modelfile.take_apart(ChatTemplate(DISTILL, bos="<s>", eos="</s>", tokens=AddedTokens()), "")
    assert (own.default, own.system, own.user) == ("<s>", ("<s>", ""), ("<｜User｜>", ""))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content | upper }}",
        CHATML.replace("message['content']", "message['content'] | trim") + "{{ messages | length }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_go_cannot_say_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="template"):
        shape(source)


def test_a_prompt_that_opens_a_thought() -> None:
    found = shape(THINKING.replace("{{ '<|endoftext|>' }}", ""))
    assert found.begin == "<|im_start|>assistant\n<think>\n"
    assert found.assistant == ("<|im_start|>assistant\n", "<|im_end|>")


def test_the_file(tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path / "x.gguf", template=CHATML)
    made = modelfile.run(path, context=100_000)
    lines = made.read_text(encoding="utf-8").splitlines()
    assert made == tmp_path / "Modelfile" and lines[0] == "FROM ./x.gguf"
    assert f"PARAMETER num_ctx {tiny_llama.CONTEXT}" in lines and 'PARAMETER stop "</s>"' in lines
    bare = tiny_llama.write(tmp_path / "y.gguf", template=None)
    with pytest.raises(InputError, match="has no chat template"):
        modelfile.run(bare)
