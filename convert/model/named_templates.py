"""Chat templates by LLaMA-Factory's names, for models that have none or are to be tuned under another one.

Each is described by what stands around a text, and written as Jinja: from there on it is a chat template as
any other, stored with the run and carried through merge, export and serving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Format:
    """What stands around the texts of a conversation; `{content}` is the text, `{eos}` the end token.

    begin: what the assistant's turn begins with. end: the token that ends it, "" for `{eos}`.
    default_system: the system message of conversations without one. bos: whether the begin token comes first.
    in_question: the system message goes into the first question. thinks: answers may begin with a thought,
    which later prompts leave out. tools: tools and their calls are shown, as Qwen's models write them.
    """

    user: str
    begin: str
    answer: str = "{content}{eos}"
    system: str = "{content}"
    end: str = ""
    default_system: str = ""
    bos: bool = False
    in_question: bool = False
    thinks: bool = False
    tools: bool = False


_CHATML = Format(
    user="<|im_start|>user\n{content}<|im_end|>\n",
    begin="<|im_start|>assistant\n",
    answer="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    end="<|im_end|>",
)
_QWEN3 = replace(_CHATML, tools=True)
_DEEPSEEK3 = Format(user="<｜User｜>{content}", begin="<｜Assistant｜>", bos=True)
_GEMMA = Format(
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    begin="<start_of_turn>model\n",
    answer="{content}<end_of_turn>\n",
    system="{content}\n\n",
    end="<end_of_turn>",
    bos=True,
    in_question=True,
)

FORMATS = {
    "default": Format(
        user="Human: {content}{eos}\n",
        begin="Assistant:",
        answer="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "alpaca": Format(
        user="### Instruction:\n{content}\n\n",
        begin="### Response:\n",
        answer="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": _CHATML,
    "qwen": replace(
        _QWEN3, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen3": replace(_QWEN3, thinks=True),
    "qwen3_nothink": _QWEN3,
    "deepseek": Format(user="User: {content}\n\n", begin="Assistant:", system="{content}\n\n", bos=True),
    "deepseek3": _DEEPSEEK3,
    "deepseekr1": replace(_DEEPSEEK3, thinks=True),
    "llama3": Format(
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        begin="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{content}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        end="<|eot_id|>",
        bos=True,
    ),
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "mistral": Format(
        user="[INST] {content}[/INST]",
        begin="",
        answer=" {content}{eos}",
        system="{content}\n\n",
        bos=True,
        in_question=True,
    ),
    "phi": Format(
        user="<|user|>\n{content}<|end|>\n",
        begin="<|assistant|>\n",
        answer="{content}<|end|>\n",
        system="<|system|>\n{content}<|end|>\n",
        end="<|end|>",
    ),
    "phi4": Format(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
        begin="<|im_start|>assistant<|im_sep|>",
        answer="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        end="<|im_end|>",
    ),
}

_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>"
)
# Results that follow one another are one turn.
_RESULTS = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or talk[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{% if loop.last or talk[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)
_CALLED = (
    "{% set ns = namespace(text=content) %}{% for c in m.tool_calls or [] %}"
    "{% set ns.text = ns.text + ('\\n' if ns.text else '') + '<tool_call>\\n{\"name\": ' + "
    "(c.function.name | tojson) + ', \"arguments\": ' + "
    "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) + "
    "'}\\n</tool_call>' %}{% endfor %}{% set content = ns.text %}"
)
_THOUGHTLESS = (
    "{% if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
_NO_THOUGHT = (
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
)


def jinja(name: str) -> str:
    """The chat template of FORMATS[name], in Jinja."""
    form = FORMATS[name]
    default = _text(form.default_system)
    lines = ["{{ bos_token }}"] if form.bos else []
    lines.append(
        "{% if messages and messages[0].role == 'system' %}"
        f"{{% set system = messages[0].content or {default} %}}{{% set talk = messages[1:] %}}"
        f"{{% else %}}{{% set system = {default} %}}{{% set talk = messages %}}{{% endif %}}"
    )
    if form.tools:
        lines.append(
            f"{{% if tools %}}{{% set ns = namespace(text={_text(_TOOLS)}) %}}{{% for tool in tools %}}"
            "{% set ns.text = ns.text + '\\n' + (tool | tojson) %}{% endfor %}"
            f"{{% set system = system + ns.text + {_text(_CALLS)} %}}{{% endif %}}"
        )
    shown = f"{{% if system %}}{{{{ {_around(form.system, 'system')} }}}}{{% endif %}}"
    begin = f"{{{{ {_text(form.begin)} }}}}" if form.begin else ""
    lines.append("" if form.in_question else shown)
    lines.append("{% for m in talk %}{% set content = m.content or '' %}{% if m.role == 'user' %}")
    if form.in_question:
        put = f"{{% set content = {_around(form.system, 'system')} + content %}}"
        lines.append(f"{{% if loop.first and system %}}{put}{{% endif %}}")
    lines.append(f"{{{{ {_around(form.user, 'content')} }}}}{{% elif m.role == 'assistant' %}}")
    lines.append(_THOUGHTLESS if form.thinks else "")
    lines.append(
        _CALLED
        if form.tools
        else "{% if m.tool_calls %}{{ raise_exception('this chat template has no tools') }}{% endif %}"
    )
    lines.append(f"{begin}{{{{ {_around(form.answer, 'content')} }}}}")
    lines.append(_RESULTS if form.tools else "")
    lines.append(
        "{% else %}{{ raise_exception('this chat template has no role ' + m.role) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{begin}{_NO_THOUGHT if form.thinks else ''}{{% endif %}}"
    )
    return "".join(lines)


def _text(text: str) -> str:
    """`text` as Jinja writes one."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _around(shape: str, variable: str) -> str:
    """The expression of `shape` with the value of `variable` in it."""
    parts = shape.replace("{eos}", "\0eos_token\0").replace("{content}", f"\0{variable}\0").split("\0")
    return " + ".join(part if number % 2 else _text(part) for number, part in enumerate(parts) if part)
