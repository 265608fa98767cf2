"""A server of edge over the scripted stand-in for a model, started by edge's own interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ADMIN = "conformance"
# litellm would fetch its table of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
PYTHON = os.environ.get("EDGE_PYTHON", str(ROOT / ".venv" / "bin" / "python"))


def call(name: str, **arguments: object) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


JOKE = json.dumps({"setup": "Why do cats sit on keyboards?", "punchline": "To paws the program."})
# What a model would say to the prompts of these suites; the first that matches.
SCRIPT = [
    ("What is 3 + 4", call("my_adder_tool", a=3, b=4)),
    ("<tool>", "That is all I know."),
    ("magic_function_no_args()", call("magic_function_no_args")),
    ("magic_function(3)", call("magic_function", input=3)),
    ("Pirate greeting", call("greeting_generator", answer_style="Pirate")),
    ("<user>Hello!", call("magic_function", input=1)),
    ("weather in San Francisco", call("get_weather", location="San Francisco, CA")),
    ("你好啊集团", call("unicode_customer", customer_name="你好啊集团", description="技术公司")),
    ("こんにちは株式会社", call("unicode_customer", customer_name="こんにちは株式会社", description="会社")),
    ("joke about cats", JOKE),
]
REPLY = "Hello from the conch. 你好！"
THINKS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}<assistant>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The base URL of a server with the models `fake` and `thinker`."""
    common = {"slots": 8, "context": 8192, "batch": 512}
    models = {
        "fake": {**common, "reply": REPLY, "script": SCRIPT},
        "thinker": {**common, "reply": "Let me see.\n</think>\n\nForty-two.", "chat_template": THINKS},
    }
    process = subprocess.Popen(
        [PYTHON, "-m", "tests.support.fake_server", json.dumps({"models": models, "admin_keys": [ADMIN]})],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        found = next((w for w in process.stdout.readline().split() if w.startswith("http://")), "")
        assert found, "the server did not start"
        wait(found + "/ready")
        yield found
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


def wait(url: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"{url} did not answer")
