"""Chat templates as transformers renders them, and what an untrusted one cannot do."""

import datetime

import pytest

from edge.chat_template import ChatTemplate
from edge.errors import InputError, RequestError
from edge.prompt import AddedTokens
from edge.reasoning import opens_reasoning

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OPENS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<｜Assistant｜><think>\n"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def compiled(source: str, **given: str) -> ChatTemplate:
    return ChatTemplate(source, tokens=AddedTokens(), **given)


def test_chatml() -> None:
    want = "<|im_start|>user\n你好 <b>&</b><|im_end|>\n<|im_start|>assistant\n"
    assert compiled(CHATML).render(user("你好 <b>&</b>")).text == want


def test_the_usual_functions_are_there() -> None:
    template = compiled(
        "{{ strftime_now('%Y') }}|{{ {'a': '好'} | tojson }}|{% for i in [1, 2] %}{% break %}{% endfor %}"
        "{% set ns = namespace(x=1) %}{{ ns.x }}{{ eos_token }}",
        eos="</s>",
    )
    year = datetime.datetime.now().astimezone().year
    assert template.render(user("x")).text == f'{year}|{{"a": "好"}}|1</s>'


def test_raise_exception_is_a_400_with_its_text() -> None:
    template = compiled("{{ raise_exception('Conversation roles must alternate') }}")
    with pytest.raises(RequestError, match="must alternate") as caught:
        template.render(user("x"))
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ missing.attribute }}",
        "{{ range(10**9) | list }}",
        "{{ 1 + 'x' }}",
        "{{ messages[5]['content'] }}",
    ],
)
def test_a_template_can_do_no_harm_and_ends_in_a_400(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(source).render(user("x"))
    assert caught.value.status == 400


def test_an_invalid_template_is_said_to_be() -> None:
    with pytest.raises(InputError, match="not valid"):
        compiled("{% for %}")


def test_the_thinking_mode_is_applied() -> None:
    template = compiled(OPENS, bos="<｜begin▁of▁sentence｜>")
    opened = template.render(user("hi")).text
    assert opens_reasoning(opened)
    assert opened.count("<｜begin▁of▁sentence｜>") == 1
    closed = template.render(user("hi"), thinking="off").text
    assert closed.endswith("<think>\n\n</think>\n\n")
    assert not opens_reasoning(closed)
    switch = compiled("{{ enable_thinking }}")
    assert [switch.render(user("x"), thinking=mode).text for mode in ("on", "off")] == ["True", "False"]
    assert switch.render(user("x"), thinking="off", enable_thinking=True).text == "True"


def test_an_error_names_the_templates_file() -> None:
    template = compiled("{{ 'x' * 10**9 }}", file="m.gguf")
    with pytest.raises(RequestError, match=r"template \(m\.gguf\) makes a text of more than 8388608"):
        template.render(user("x"))


def test_measuring_changes_no_output() -> None:
    source = (
        "{%- for m in messages if m.role == 'user' %}{% if loop.first %}<{% endif %}{{ m.content }},"
        "{% else %}none{% endfor %}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(3 * 2 ** 2) }}{{ '-' * 3 }}"
    )
    template = compiled(source)
    assert template.render([*user("a"), *user("b")]).text == "<a,b,[12]---"
    assert template.render([{"role": "system", "content": "s"}]).text == "none[12]---"
    assert template.variables == {"messages"}
