"""Chat templates of the families whose tool calls are known, and an answer with a call of each."""

from __future__ import annotations

QWEN = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# As DeepSeek's distills have it: calls and results have a place, definitions have none.
DISTILL = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for tool in m['tool_calls'] %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' "
    "+ tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] "
    "+ '\\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}<｜Assistant｜>{{ m['content'] }}"
    "{% endif %}"
    "{% if m['role'] == 'tool' %}<｜tool▁output▁begin｜>{{ m['content'] }}<｜tool▁output▁end｜>{% endif %}"
    "{% endfor %}<｜Assistant｜>"
)
LLAMA = (
    "{% if tools %}<|start_header_id|>system{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% else %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}"
    '[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]'
    "{% endfor %}{% endif %}{% endfor %}"
)
ACTION = (
    "{% for t in tools or [] %}> Tool Name: {{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "Action: {{ c.function.name }}\nAction Input: {{ c.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}assistant:"
)
ANSWERS = {
    "hermes": ('<tool_call>\n{"name": "f", "arguments": {"k": "你"}}\n</tool_call>', QWEN),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"k": "你"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        DISTILL,
    ),
    "llama3": ('{"name": "f", "parameters": {"k": "你"}}', LLAMA),
    "mistral": ('[TOOL_CALLS] [{"name": "f", "arguments": {"k": "你"}}]', MISTRAL),
    "action": ('Action: f\nAction Input: {"k": "你"}', ACTION),
}
SCHEMA = {
    "type": "object",
    "properties": {"k": {"type": "string", "maxLength": 3}},
    "required": ["k"],
    "additionalProperties": False,
}
