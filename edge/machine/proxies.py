"""What is wrong with the proxies that the environment names, for the message of a download that failed."""

from __future__ import annotations

import importlib.util
import os

_NAMES = ("all_proxy", "https_proxy", "http_proxy")


def problem(socks_package: str) -> str:
    """The first proxy variable of a scheme that cannot be used, with what to do; "" where there is none.

    socks_package: what the downloading library needs for a socks5 proxy. The value is not shown: it may
    hold a password.
    """
    usable = {"", "http", "https"}
    if importlib.util.find_spec(socks_package):
        usable |= {"socks5", "socks5h"}
    for name, value in os.environ.items():
        scheme = value.strip().rpartition("://")[0].lower()
        if name.lower() in _NAMES and scheme not in usable:
            return (
                f"{name} names a {scheme}:// proxy, which cannot be used: set {name} to its http:// address "
                "(most proxy programs have one), or unset it"
            )
    return ""
