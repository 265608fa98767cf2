"""What the model of the API families' tests says: an answer, a tool call, and reasoning."""

REPLY = "你好, world!"
CALL = '<tool_call>\n{"name": "f", "arguments": {"k": 1}}\n</tool_call>'
TOOL = {"type": "object", "properties": {"k": {"type": "integer"}}}
THINKER = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)
