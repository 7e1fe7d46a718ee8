"""What a user reads about methods."""

from pathlib import Path

import pytest

from pupil.cards import card, page, settings, tables
from pupil.methods import METHODS
from pupil.models import NETWORKS
from pupil.types import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_methods_is_up_to_date() -> None:
    """`python -m pupil explain --markdown > docs/methods.md` renews it."""
    assert (ROOT / "docs/methods.md").read_text() == page()


@pytest.mark.parametrize("name", METHODS)
def test_a_card_shows_every_setting_and_preset(name: str) -> None:
    text = card(name)
    for field, default, about in settings(name):
        assert about, f"hp.{name}.{field} has no comment beside it in the code"
        assert field == "preset" or f"  {field} " in text
        assert field == "preset" or str(default) in text
    assert all(f"  {preset}: " in text for preset in METHODS[name].presets)
    assert max(map(len, text.splitlines())) <= 150


def test_the_tables_name_everything_once() -> None:
    names = [line.split()[0] for line in tables() if line.startswith("  ")]
    assert {*METHODS, *NETWORKS} <= set(names)
    assert len(names) == len(set(names))
    assert list(tables("methods")) == list(tables())[: 1 + len(METHODS)]


def test_an_unknown_method_is_one_line() -> None:
    with pytest.raises(UserError, match=r"there is no method 'simkdd'; did you mean 'simkd'\?"):
        card("simkdd")
