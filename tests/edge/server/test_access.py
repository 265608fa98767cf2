"""Keys and origins as the command line gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import InputError, UsageError
from edge.server.access import Access, check_origin, read_keys


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


@pytest.mark.parametrize("origin",
    ["*", "app.example", "https://", "https://a.example/path", "ftp://a", "file://", "null", "http://*",
     "https://*.a.example", "http://a:port", "http://a:", "http://A", "https://ü.example", "http://a:1\n"],
)  # fmt: skip
def test_an_origin_that_is_none_is_refused_at_start(origin: str) -> None:
    with pytest.raises(UsageError, match="no origin"):
        check_origin(origin)


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "http://localhost:*", "http://[::1]:3000", "app://obsidian.md",
     "tauri://localhost", "chrome-extension://abcdefghijklmnop", "capacitor://localhost", "ionic://localhost",
     "moz-extension://0a1b-2c", "vscode-webview://x1"],
)  # fmt: skip
def test_origins_of_pages_and_apps_are_taken(origin: str) -> None:
    assert check_origin(origin) == origin


def test_a_star_stands_for_any_port_and_nothing_else() -> None:
    access = Access(origins=("http://localhost:*", "http://[::1]:*", "app://obsidian.md"))
    for origin in ("http://localhost", "http://localhost:1", "http://localhost:65535", "http://[::1]:80",
                   "http://[::1]", "app://obsidian.md"):  # fmt: skip
        assert access.allows(origin), origin
    for origin in ("https://localhost:1", "http://localhost.evil:1", "http://localhost:1:2", "null", "",
                   "http://localhost:evil", "app://obsidian.md:1", "http://localhost:*x"):  # fmt: skip
        assert not access.allows(origin), origin
