"""Names of request fields, for all API families: what clients of other servers call ours, or send besides.

A field that a route has is never looked up here. Any other is another name of a field that the route has, or
a hint, which is ignored, or could change the answer: then it is refused unless its value asks for nothing.
What no table knows is kept: `Closed` bodies refuse it, others say in the response that it was ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from edge.errors import RequestError

# Each row is one meaning. A route takes any of the names for the one that it has.
_SAME = (
    (
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "max_new_tokens",
        "n_predict",
        "num_predict",
    ),
    ("repetition_penalty", "repeat_penalty"),
    ("stop", "stop_sequences"),
    ("seed", "random_seed"),
)  # fmt: skip
_GROUPS = {name: group for group in _SAME for name in group}

# Fields for a server's books, its cache, its log, how a model is loaded, or samplers that are switched on by
# another field. Without them the answer is the same.
HINTS = frozenset(
    """
    anthropic_beta anthropic_version betas cache_control cache_salt chat_id client_metadata disable_fallback
    extra_headers guided_decoding_backend guided_options_request id_slot include inference_geo keep_alive
    metadata model_kwargs moderation parent_message_id prediction priority prompt_cache_key
    prompt_cache_options prompt_cache_retention request_id return_progress safety_identifier service_tier
    session_id shift slot_id speed store stream_options timings_per_token truncate truncation ttl user user_id
    verbosity
    dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers dynatemp_exponent mirostat_eta
    mirostat_tau xtc_threshold
    embedding_only f16_kv kv_cache_dtype logits_all low_vram main_gpu n_discard n_keep num_batch num_ctx
    num_gpu num_keep num_thread numa use_mlock use_mmap vocab_only
    """.split()  # noqa: SIM905
)

_ELSEWHERE = "put it into the messages"
_NOTHING_KEPT = "this server keeps nothing between requests"
_TEXT_ONLY = "this is a text model"
# Why a field is refused, and the values that ask for nothing. Without any, false and 0 do; empty ones always.
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_bos_token": ("", (True,)),
    "add_special_tokens": ("", (True,)),
    "audio": (_TEXT_ONLY, ()),
    "background": (_NOTHING_KEPT, ()),
    "best_of": ("", (1,)),
    "chat_template": ("the model's own is used", ()),
    "container": ("", ()),
    "conversation": (_NOTHING_KEPT, ()),
    "detokenize": ("", (True,)),
    "documents": (_ELSEWHERE, ()),
    "do_sample": ("temperature 0 is greedy, any other samples", ()),
    "early_stopping": ("there is no beam search", ()),
    "embd_normalize": ("vectors have length 1", (2,)),
    "encoding_format": ("", ("float",)),
    "extra_body": ("its fields belong at the top level", ()),
    "function_call": ("use tool_choice", ("auto", "none")),
    "functions": ("use tools", ()),
    "generation_config": ("its fields belong at the top level", ()),
    "guidance_scale": ("", (1,)),
    "image": (_TEXT_ONLY, ()),
    "images": (_TEXT_ONLY, ()),
    "include_reasoning": ("use reasoning_format", (True,)),
    "input_type": ("texts are embedded as they are", ()),
    "instructions": (_ELSEWHERE, ()),
    "length_penalty": ("there is no beam search", (1,)),
    "max_tool_calls": (_NOTHING_KEPT, ()),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "n": ("one answer comes of a request", (1,)),
    "normalize": ("vectors have length 1", (True,)),
    "num_beams": ("there is no beam search", (1,)),
    "num_return_sequences": ("use n", (1,)),
    "options": ("its fields belong at the top level", ()),
    "parallel_tool_calls": ("", (True,)),
    "parameters": ("its fields belong at the top level", ()),
    "penalize_newline": ("", (True,)),
    "penalize_nl": ("", (True,)),
    "previous_response_id": (_NOTHING_KEPT, ()),
    "prompt_name": ("texts are embedded as they are", ()),
    "repeat_last_n": ("the penalty looks at everything", (-1,)),
    "repeat_penalty": ("", (1,)),
    "repetition_penalty": ("", (1,)),
    "return_full_text": ("", ()),
    "sampling_params": ("its fields belong at the top level", ()),
    "skip_special_tokens": ("", (True,)),
    "spaces_between_special_tokens": ("", (True,)),
    "seed": ("", (None,)),
    "system": (_ELSEWHERE, ()),
    "task": ("texts are embedded as they are", ()),
    "temperature": ("", (None,)),
    "tfs": ("", (1,)),
    "tfs_z": ("", (1,)),
    "thinking": ("use enable_thinking", ()),
    "think": ("use enable_thinking", ()),
    "tool_choice": ("", ("auto",)),
    "top_p": ("", (1,)),
    "typical_p": ("", (1,)),
    "typical": ("", (1,)),
    "use_cache": ("use cache_prompt", (True,)),
}
# Parts of names by which servers bind an answer or change a prompt, a token's chances or what comes back.
_BINDING = re.compile(
    r"""
    (^|_)allow | (^|_)ban | bad_word | force | suppress | exclu | grammar | regex | schema | ebnf |
    guided | struct | constrain | penal | sampl | mirostat | ^dry_ | ^xtc_ | typical | ^tfs | ^top_ |
    ^min_ | ^max_ | temperature | dynatemp | smooth | ngram | beam | nucleus | cutoff | nsigma | logit |
    prob(s|abil|$) | bias | seed | (^|_)eos | stop | ^t_max | decay | watermark | tokens | token_ |
    truncat | template | prompt | context | history | prefix | suffix | instruct | system | document |
    (^|_)format | reason | think | effort | tool | function | mcp | search | lora | adapter |
    control_vector | transform | plugin | vllm_xargs | custom_param | ^return_ | ^echo$ | ^n$ |
    mm_processor | video | _config$
    """,
    re.VERBOSE,
)


def resolved(given: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The fields of a body by the names that its route has, less those that are null or ask for nothing.

    fields: the names that the route has. Raises RequestError for a field that could change the answer.
    """
    kept: dict[str, Any] = {}
    for name, value in given.items():
        target = next((same for same in (name, *_GROUPS.get(name, ())) if same in fields), name)
        if value is None or (target not in fields and (name in HINTS or _asks_nothing(name, value, given))):
            continue
        if target in kept and kept[target] != value:
            raise RequestError(f"{name} and {target} mean the same here; give one", param=name)
        kept[target] = value
    return kept


def _asks_nothing(name: str, value: Any, given: dict[str, Any]) -> bool:
    """Whether a value of a field that could change the answer does not. Raises RequestError where it does."""
    if name not in _REFUSED and name not in _GROUPS and not _BINDING.search(name):
        return False
    why, neutral = _REFUSED.get(name, ("it could change the answer", ()))
    unpenalised = all(given.get(other) in (None, 1) for other in ("repeat_penalty", "repetition_penalty"))
    if value in (neutral or (False,)) or value in ("", [], {}) or (name == "repeat_last_n" and unpenalised):
        return True
    text = f"{name} is not supported" + (f": {why}" if why else "")
    raise RequestError(text, code="unsupported", param=name)
