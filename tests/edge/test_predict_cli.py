"""`edge predict`: wrong arguments are answered before a model is looked for."""

from __future__ import annotations

import pytest

from edge import predict_cli
from edge.errors import UsageError


@pytest.mark.parametrize("argv", [["--temperature", "3"], ["--max-tokens", "0"]])
def test_wrong_values_are_named(argv: list[str]) -> None:
    with pytest.raises(UsageError, match=argv[0]):
        predict_cli.main(["model", "questions.txt", *argv])
