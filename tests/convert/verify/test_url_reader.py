"""Which server is at a URL, and which of its models."""

from __future__ import annotations

import pytest

from convert.verify.url_reader import UrlReader, open_url
from edge.errors import InputError
from tests.support.engines import Engine, TableModel, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TableModel:
    return TableModel(tmp_path_factory.mktemp("model"))


def opened(a: TableModel, engine: Engine, **given: str) -> UrlReader:
    with serving(engine) as url:
        return open_url(url, a, **given)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("llama-server", "llama-server"), ("vllm", "vLLM"), ("ollama", "Ollama"), ("openai", "a server")],
)
def test_servers_are_known_by_what_they_answer(model: TableModel, kind: str, stage: str) -> None:
    assert opened(model, Engine(kind, model)).stage == stage


def test_several_models(model: TableModel) -> None:
    two = Engine("openai", model, models=["conch", "base"])
    with pytest.raises(InputError, match="serves 2 models: conch, base") as caught:
        opened(model, two)
    assert caught.value.hint == "name one: --model NAME"
    assert opened(model, two, model="base").model == "base"
    with pytest.raises(InputError, match="serves no model 'other'"):
        opened(model, two, model="other")
    with pytest.raises(InputError, match="serves 0 models: none"):
        opened(model, Engine("openai", model, models=[]))
    # Ollama's names have tags.
    assert opened(model, Engine("ollama", model, models=["a:latest", "b:7b"]), model="a").model == "a:latest"


def test_what_a_server_changes_by_itself_is_switched_off(model: TableModel) -> None:
    """A repetition penalty of a generation config changes greedy answers of the right model."""
    for kind, field in (("vllm", "repetition_penalty"), ("llama-server", "repeat_penalty")):
        engine = Engine(kind, model)
        with serving(engine) as url:
            open_url(url, model).answer([{"role": "user", "content": "a"}], 3)
        assert all(body[field] == 1.0 for body in engine.asked if "max_tokens" in body)


def test_llama_server_names_no_token_that_ends_within_a_character(
    model: TableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two bytes of this one are equal: its entry is the last one's."""
    [ids] = model.encode(["ᠠ"])
    assert len(ids) == 3 and ids[1] == ids[2]
    engine = Engine("llama-server", model)
    monkeypatch.setattr(engine, "_speak", lambda *_: (ids, None))
    with serving(engine) as url:
        answer = open_url(url, model).answer([{"role": "user", "content": "a"}], 3)
    assert [token.id for token in answer.tokens] == ids
    assert [token.logprob is None for token in answer.tokens] == [True, True, False]


def test_vllm_names_the_token_at_which_it_ends(model: TableModel) -> None:
    with serving(Engine("vllm", model)) as url:
        reader = open_url(url, model)
        answers = [reader.answer([{"role": "user", "content": word}], 24) for word in ("a", "b", "c", "d")]
    ended = [answer for answer in answers if answer.ended]
    assert ended
    for answer in answers:
        ids = [int(token.token.removeprefix("token_id:")) for token in answer.tokens]
        assert (ids[-1] in model.stop_ids) == answer.ended
        assert model.decode([ids])[0] == answer.text


def test_the_thinking_mode_is_asked_for_where_prompts_are_tokenized(model: TableModel) -> None:
    engine = Engine("vllm", model)
    model.thinking = "off"
    with serving(engine) as url:
        open_url(url, model).prompt_ids([[{"role": "user", "content": "a"}]])
    model.thinking = None
    assert engine.asked[-1]["chat_template_kwargs"] == {"enable_thinking": False}
