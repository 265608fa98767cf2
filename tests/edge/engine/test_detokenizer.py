"""Incremental text: joined pieces equal the whole, stop strings never leak."""

from hypothesis import given
from hypothesis import strategies as st

from edge.engine.detokenizer import TextStream


def stream(parts: list[bytes], stops: list[str] = []) -> tuple[list[str], str | None]:  # noqa: B006
    text = TextStream(stops)
    shown = []
    for part in parts:
        shown.append(text.push(part))
        if text.stopped is not None:
            break
    shown.append(text.finish())
    return shown, text.stopped


def test_s1_characters_are_never_cut() -> None:
    whole = "你好👩‍🚀🇨🇳"
    shown, _ = stream([bytes([b]) for b in whole.encode()])
    assert "".join(shown) == whole
    assert "\ufffd" not in "".join(shown)
    assert shown.count("你") == 1


def test_s2_stop_string_across_tokens() -> None:
    shown, stopped = stream([b"AB", b"CDE", b"FG"], ["DEFG"])
    assert ("".join(shown), stopped) == ("ABC", "DEFG")
    assert all("D" not in part for part in shown)


def test_s2_held_tail_is_flushed() -> None:
    shown, stopped = stream([b"AB", b"CDE", b"FG"], ["FGH"])
    assert ("".join(shown), stopped) == ("ABCDEFG", None)


def test_earliest_stop_wins() -> None:
    shown, stopped = stream([b"one two three"], ["three", "two"])
    assert ("".join(shown), stopped) == ("one ", "two")


def test_broken_tail_is_shown_as_replacement() -> None:
    shown, _ = stream(["好".encode()[:2]])
    assert "".join(shown) == "\ufffd"


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_any_split_gives_the_same(whole: str, stops: list[str], data: st.DataObject) -> None:
    raw = whole.encode()
    parts = []
    while raw:
        n = data.draw(st.integers(1, 5))
        parts.append(raw[:n])
        raw = raw[n:]
    shown, stopped = stream(parts, stops)
    at = [whole.find(stop) for stop in stops if stop in whole]
    if stopped is None:
        assert not at
        assert "".join(shown) == whole
    else:
        # The stop that is complete first ends the text; what is shown never contains a stop string.
        assert whole.startswith("".join(shown) + stopped)
        assert not any(stop in "".join(shown) for stop in stops)
