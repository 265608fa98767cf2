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
    which later prompts leave out. tools: how tools and their calls are written, a key of TOOLS. call: what
    stands around calls, "" for `answer`. result: around a tool's result, "" for `user`.
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
    tools: str = "action"
    call: str = ""
    result: str = ""


@dataclass(frozen=True)
class Tools:
    """How tools and their calls are written; all but `between` are expressions of Jinja.

    head, each, foot: what says which tools there are, `each` of `tool`, whose arguments `ns.lines` lists.
    call: a call of `c.function`. between: stands between calls. around: "" or the condition under which
    calls, `count` of them, are a list in brackets.
    """

    head: str
    each: str
    foot: str
    call: str
    between: str = "\n"
    around: str = ""


_CHATML = Format(
    user="<|im_start|>user\n{content}<|im_end|>\n",
    begin="<|im_start|>assistant\n",
    answer="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    end="<|im_end|>",
    result="<|im_start|>tool\n{content}<|im_end|>\n",
)
_QWEN3 = replace(_CHATML, tools="qwen")
_DEEPSEEK3 = Format(user="<｜User｜>{content}", begin="<｜Assistant｜>", bos=True)
_GEMMA = Format(
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    begin="<start_of_turn>model\n",
    answer="{content}<end_of_turn>\n",
    system="{content}\n\n",
    end="<end_of_turn>",
    bos=True,
    in_question=True,
    result="<start_of_turn>tool\n{content}<end_of_turn>\n",
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
        tools="llama3",
        result="<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>",
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
        tools="mistral",
        call="[TOOL_CALLS] {content}{eos}",
        result='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
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


def _text(text: str) -> str:
    """`text` as Jinja writes one."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


_NAME = "c.function.name"
_ARGUMENTS = "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)"
_OBJECT = f"'{{\"name\": ' + ({_NAME} | tojson) + ', \"KEY\": ' + {_ARGUMENTS} + '}}'"

# As LLaMA-Factory has them, by its names; "action" is its default.
TOOLS = {
    "action": Tools(
        head=_text("You have access to the following tools:\n"),
        each="'> Tool Name: ' + f.name + '\\nTool Description: ' + (f.description or '') "
        "+ '\\nTool Args:\\n' + ns.lines + '\\n'",
        foot=_text(
            "Use the following format if using a tool:\n```\nAction: tool name (one of [\0])\n"
            "Action Input: the input to the tool, in a JSON format representing the kwargs "
            '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
        ).replace("\0", "' + tools | map(attribute='function.name') | join(', ') + '"),
        call=f"'Action: ' + {_NAME} + '\\nAction Input: ' + {_ARGUMENTS}",
    ),
    "qwen": Tools(
        head=_text(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        ),
        each="'\\n' + (tool | tojson)",
        foot=_text(
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
            'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call>"
        ),
        call=f"'<tool_call>\\n' + {_OBJECT.replace('KEY', 'arguments')} + '\\n</tool_call>'",
    ),
    "llama3": Tools(
        head="'Cutting Knowledge Date: December 2023\\nToday Date: ' + strftime_now('%d %b %Y') + "
        + _text(
            "\n\nYou have access to the following functions. To call a function, please respond with JSON "
            'for a function call. Respond in the format {"name": function name, "parameters": dictionary of '
            "argument name and its value}. Do not use variables.\n\n"
        ),
        each="(tool | tojson(indent=4)) + '\\n\\n'",
        foot="''",
        call=_OBJECT.replace("KEY", "parameters"),
        between=", ",
        around="count > 1",
    ),
    "mistral": Tools(
        head="'[AVAILABLE_TOOLS] ['",
        each="('' if loop.first else ', ') + (tool | tojson)",
        foot="'][/AVAILABLE_TOOLS]'",
        call=_OBJECT.replace("KEY", "arguments"),
        between=", ",
        around="true",
    ),
}

# A line for each argument of a tool, in `ns.lines`; `items` and `get` are keys of some.
_LINES = (
    "{% set f = tool.function %}{% set ns.lines = '' %}{% set given = f.parameters or {} %}"
    "{% for key, p in (given.properties or {}).items() %}{% set ns.lines = ns.lines ~ '  - ' ~ key ~ ' (' ~ "
    "(p.type or '') ~ (', required' if key in (given.required or []) else '') ~ '): ' ~ "
    "(p.description or '') ~ (', should be one of [' ~ (p.enum | join(', ')) ~ ']' if p.enum else '') ~ "
    "(', where each item should be ' ~ (p.get('items').type or '') if p.get('items') else '') ~ '\\n' %}"
    "{% endfor %}"
)
# Qwen's results that follow one another are one turn.
_RESULTS = (
    "{% if loop.first or talk[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{% if loop.last or talk[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
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
    shown = f"{{% if system %}}{{{{ {_around(form.system, 'system')} }}}}{{% endif %}}"
    begin = f"{{{{ {_text(form.begin)} }}}}" if form.begin else ""
    lines = ["{{ bos_token }}"] if form.bos else []
    lines += [_system(form), "" if form.in_question else shown]
    lines.append("{% for m in talk %}{% set content = m.content or '' %}{% if m.role == 'user' %}")
    if form.in_question:
        put = f"{{% set content = {_around(form.system, 'system')} + content %}}"
        lines.append(f"{{% if loop.first and system %}}{put}{{% endif %}}")
    lines.append(f"{{{{ {_around(form.user, 'content')} }}}}{{% elif m.role == 'assistant' %}}")
    lines.append(_THOUGHTLESS if form.thinks else "")
    lines.append(f"{begin}{{% if m.tool_calls %}}{_calls(form)}{{% else %}}")
    lines.append(f"{{{{ {_around(form.answer, 'content')} }}}}{{% endif %}}{{% elif m.role == 'tool' %}}")
    result = f"{{{{ {_around(form.result or form.user, 'content')} }}}}"
    lines.append(_RESULTS if form.tools == "qwen" else result)
    lines.append(
        "{% else %}{{ raise_exception('this chat template has no role ' + m.role) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{begin}{_NO_THOUGHT if form.thinks else ''}{{% endif %}}"
    )
    return "".join(lines)


def _system(form: Format) -> str:
    """What sets `system`, the tools in it, and `talk`, the other messages."""
    default, tools = _text(form.default_system), TOOLS[form.tools]
    return (
        "{% if messages and messages[0].role == 'system' %}"
        f"{{% set system = messages[0].content or {default} %}}{{% set talk = messages[1:] %}}"
        f"{{% else %}}{{% set system = {default} %}}{{% set talk = messages %}}{{% endif %}}"
        f"{{% if tools %}}{{% set ns = namespace(text={tools.head}, lines='') %}}{{% for tool in tools %}}"
        f"{_LINES if 'ns.lines' in tools.each else ''}{{% set ns.text = ns.text + {tools.each} %}}"
        "{% endfor %}"
        f"{{% set system = system + ns.text + {tools.foot} %}}{{% endif %}}"
    )


# A thought ends with blank lines of its own.
_BREAK = "'\\n' if content and not content.endswith('\\n') else ''"


def _calls(form: Format) -> str:
    """What writes the calls of the message `m`, behind its `content`."""
    tools = TOOLS[form.tools]
    opens, closes = "", ""
    if tools.around:
        opens, closes = (f" + ('{bracket}' if {tools.around} else '')" for bracket in "[]")
    return (
        "{% set count = m.tool_calls | length %}"
        f"{{% set ns = namespace(text=content + ({_BREAK}){opens}) %}}"
        f"{{% for c in m.tool_calls %}}{{% set ns.text = ns.text + {tools.call} + "
        f"('' if loop.last else {_text(tools.between)}) %}}{{% endfor %}}"
        f"{{% set content = ns.text{closes} %}}{{{{ {_around(form.call or form.answer, 'content')} }}}}"
    )


def _around(shape: str, variable: str) -> str:
    """The expression of `shape` with the value of `variable` in it."""
    parts = shape.replace("{eos}", "\0eos_token\0").replace("{content}", f"\0{variable}\0").split("\0")
    return " + ".join(part if number % 2 else _text(part) for number, part in enumerate(parts) if part)
