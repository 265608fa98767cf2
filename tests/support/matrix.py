"""The whole matrix of families and types is for `make test-all`; `make test` takes a few of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """`values` as parameters, all but those of `kept` marked `matrix`. A tuple counts by its first item."""
    params = []
    for value in values:
        items = value if isinstance(value, tuple) else (value,)
        params.append(pytest.param(*items, marks=[] if items[0] in kept else [pytest.mark.matrix]))
    return params
