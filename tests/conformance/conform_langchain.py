"""langchain's own integration suites for chat models and embeddings, through langchain-openai."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests


def said(model: ChatOpenAI, *, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke("Think of a number.")
    whole = None
    for chunk in model.stream("Think of a number."):
        whole = chunk if whole is None else whole + chunk
    return whole


class TestChat(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _served(self, url: str) -> None:
        type(self).url = url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # Without the switch langchain-openai leaves usage out of streams of servers other than OpenAI's.
        return {"model": "fake", "base_url": f"{self.url}/v1", "api_key": "none", "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "thinker"

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {kind: ["reasoning_output", "cache_read_input"] for kind in ("invoke", "stream")}

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return said(ChatOpenAI(**{**self.chat_model_params, "model": "thinker"}), stream=stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatOpenAI(**self.chat_model_params)
        said(model, stream=False)
        return said(model, stream=stream)


class TestEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _served(self, url: str) -> None:
        type(self).url = url

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        # Its own tokenizer would be fetched from elsewhere.
        return {
            "model": "fake",
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "check_embedding_ctx_length": False,
        }
