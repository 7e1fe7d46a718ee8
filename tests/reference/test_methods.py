"""Every loss against numbers that the authors' own code gave, through the real method classes.

A checker is a function from a case to our values of its outputs, by name.  Which one applies is decided by the
`method` in the vector's meta; shapes, seeds and hyper-parameters all come from the vector.
"""

import pytest

from pupil.methods import METHODS
from tests.reference import (
    checks_data,
    checks_first,
    checks_logits,
    checks_maps,
    checks_optimiser,
    checks_relations,
    checks_systems_cskd,
    checks_systems_heads,
    checks_systems_refilled,
    checks_systems_sakd,
)
from tests.reference.blocks import Row
from tests.reference.golden import Case, compare

WANTED: dict[str, Row] = {  # by `method` in the meta of the vectors; not written yet
}
ROWS: dict[str, Row] = (
    WANTED
    | checks_data.ROWS
    | checks_first.ROWS
    | checks_logits.ROWS
    | checks_optimiser.ROWS
    | checks_relations.ROWS
    | checks_maps.ROWS
    | checks_systems_cskd.ROWS
    | checks_systems_sakd.ROWS
    | checks_systems_heads.ROWS
    | checks_systems_refilled.ROWS
)


def test_method_matches_golden_vector(case: Case) -> None:
    if case.method not in ROWS:
        pytest.skip(f"pupil has no method {case.method!r} yet (source {case.meta.get('source_repo')})")
    row = ROWS[case.method]
    missing = [name for name in row.names if name not in METHODS]
    if missing:
        pytest.skip(f"pupil has no method {', '.join(missing)!r} yet (golden {case.method!r})")
    assert row.check is not None, f"{row.names} is in METHODS now, so golden {case.method!r} needs a checker here"
    wrong = compare(case, row.check(case), row.informational)
    assert not wrong, "\n".join([f"{case.id}: {case.meta.get('description', '')}", *wrong])
