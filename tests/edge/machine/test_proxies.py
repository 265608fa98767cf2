"""The proxy variable that is to blame for a failed download."""

from __future__ import annotations

import os

import pytest

from edge.machine import llamacpp_source, proxies


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"]
)
@pytest.mark.parametrize("scheme", ["socks", "socks5", "socks4", "ftp", "SOCKS5H"])
def test_u10_a_scheme_that_cannot_be_used_is_named(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proxies.problem("no_such_package") == ""
    monkeypatch.setenv(name, f"{scheme}://user:secret@127.0.0.1:7891/")
    text = proxies.problem("no_such_package")
    assert text.startswith(f"{name} names a {scheme.lower()}:// proxy")
    assert f"set {name} to its http:// address" in text and "unset it" in text and "secret" not in text


def test_what_can_be_used_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:8080")
    monkeypatch.setenv("http_proxy", "127.0.0.1:8080")
    assert proxies.problem("no_such_package") == ""
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    assert proxies.problem("os") == ""  # the package is there


@pytest.mark.slow
def test_pip_fails_with_the_name_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9/")
    with pytest.raises(llamacpp_source.UnavailableError, match="trying failed") as caught:
        llamacpp_source.pip(
            ["download", "--no-deps", "--retries", "0", "--no-cache-dir", "no/such\n"], "trying"
        )
    assert caught.value.hint.startswith("ALL_PROXY names a socks:// proxy")
