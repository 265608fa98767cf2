"""The converted toy of the converters' tests."""

from tests.convert.conftest import converted_before, converted_toy

__all__ = ["converted_before", "converted_toy"]
