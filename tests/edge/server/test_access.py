"""Keys and origins as the command line gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import InputError, UsageError
from edge.server.access import check_origin, read_keys


def test_keys_come_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ключи"
    file.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    monkeypatch.delenv("EDGE_API_KEY", raising=False)
    assert read_keys(None, "EDGE_API_KEY") == []
    assert read_keys(file, "EDGE_API_KEY") == ["one", "two"]
    monkeypatch.setenv("EDGE_API_KEY", "three ")
    assert read_keys(file, "EDGE_API_KEY") == ["three", "one", "two"]
    file.write_text("\n", encoding="utf-8")
    for path in (file, tmp_path / "none"):
        with pytest.raises(InputError, match=r"one API key a line|no key"):
            read_keys(path, "EDGE_API_KEY")


@pytest.mark.parametrize("origin", ["*", "app.example", "https://", "https://a.example/path", "ftp://a"])
def test_an_origin_that_is_none_is_refused_at_start(origin: str) -> None:
    with pytest.raises(UsageError, match="no origin"):
        check_origin(origin)
