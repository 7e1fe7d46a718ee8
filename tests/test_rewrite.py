"""Values of a YAML text are changed and nothing else."""

import pytest
import yaml

from pupil.rewrite import rewrite
from pupil.types import UserError
from tests.test_recipes import PAGE, comments, over

MESSY = """# top
teachers:  # on the key
  # which
  - wrn_16_1   # first
  - "res # net56"   # second
# here the students
students:
- 'resnet8'

# below
methods: [kd,
  # in between
  crd]  # after
data: {name: digits, image_size: 8}  # flow
shkd:      # none
optim:
  lr: 0.1    # mine
  # epochs
  epochs: 3
hp:
  dist:
    preset: default  # block
    T: 3.0   # mine
  # end of hp
# end
"""

OVER = {
    "teachers": ["resnet56"],
    "students": ["resnet20"],
    "methods": ["dist"],
    "data": {"flip": None, "image_size": 32},
    "shkd": [],
    "teacher": {"optim": {"lr": 0.05, "milestones": [150, 180]}},
    "optim": {"nesterov": True, "lr": 0.05, "epochs": 240},
    "hp": {"dist": {"preset": "cifar"}, "kd": {"preset": "simkd"}},
}


def test_a_page_is_written_as_it_was_read() -> None:
    """Byte for byte, where nothing changes; of a page that is written in another manner every comment stays."""
    for text in (PAGE.read_text(), MESSY):
        assert rewrite(text, {}) == (text, [])
        assert rewrite(text, yaml.safe_load(text)) == (text, [])
    text, changes = rewrite(MESSY, OVER, whole="hp")
    assert sorted(comments(text)) == sorted(comments(MESSY.replace("res # net56", "")))
    assert yaml.safe_load(text) == over(yaml.safe_load(MESSY), OVER)
    assert "teachers: [wrn_16_1, res # net56] -> [resnet56]" in changes
    assert "  lr: 0.05   # mine\n  # epochs\n  epochs: 240\n" in text
    assert rewrite(text, OVER, whole="hp") == (text, [])


def test_what_cannot_be_edited_is_refused() -> None:
    with pytest.raises(UserError, match="anchors"):
        rewrite("optim: &o {lr: 0.1}\nteacher: {optim: *o}\n", {"optim": {"lr": 0.2}})


def test_small_numbers_are_numbers_to_every_reader() -> None:
    text, changes = rewrite("a: 0.1  # why\n", {"a": 4e-5})
    assert (text, changes) == ("a: 0.00004  # why\n", ["a: 0.1 -> 0.00004"])
