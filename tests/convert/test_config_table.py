"""The table of keys in docs/training.md: made of the key table, with every key of LLaMA-Factory 0.9.5."""

from __future__ import annotations

import json
import re
from pathlib import Path

from convert import config_table
from convert.config import parse
from convert.config_keys import FIELDS
from tests.convert.test_config import NEEDED

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
# Names and defaults of the data classes in its `hparams` and of the transformers' one under them.
THEIRS = json.loads((Path(__file__).parent / "llamafactory_keys.json").read_text(encoding="utf-8"))


def test_the_page_has_the_table_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(config_table.BEGIN)[1].split(config_table.END)[0] == config_table.table()


def test_every_key_of_theirs_stands_under_one_head() -> None:
    first = [line.split(" | ")[0] for line in config_table.table().splitlines() if line.startswith("| `")]
    named = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) == len(set(named))
    assert {name for keys in THEIRS.values() for name in keys} <= set(named)


def test_their_defaults_are_taken_and_change_nothing() -> None:
    """A YAML that spells out every default of theirs is the one that leaves them out."""
    given = {name: value for keys in THEIRS.values() for name, value in keys.items() if name not in NEEDED}
    config = parse({**given, **NEEDED, "do_train": None})
    plain = parse(NEEDED)
    other = {name for name in FIELDS if getattr(config, name) != getattr(plain, name)}
    # Ours are LLaMA-Factory's page's, or what every machine has.
    assert other == {"logging_steps", "optim"}


def test_it_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{config_table.BEGIN}old\n{config_table.END}after\n", encoding="utf-8")
    assert config_table.main([str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{config_table.BEGIN}{config_table.table()}{config_table.END}after\n"
