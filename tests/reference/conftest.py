"""One test per golden vector in the folder given by --golden."""

import pytest
import torch

from tests.reference.golden import Case, find_cases, listings

LARGE = 25_000_000  # parameters: seconds each


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    cases = find_cases(folder)
    if not cases:
        raise pytest.UsageError(f"--golden {folder}: no golden vector (an npz file with `meta`) in this folder")
    wanted = [c for c in cases if c.is_model == (metafunc.function.__name__ == "test_network_matches_golden_vector")]
    large = {row["golden_file"] for row in listings(folder / "models.json") if row.get("total_params", 0) > LARGE}
    marks = {c.id: [pytest.mark.slow] if c.is_model and c.path.name in large else [] for c in wanted}
    metafunc.parametrize("case", [pytest.param(c, id=c.id, marks=marks[c.id]) for c in wanted])


@pytest.fixture(autouse=True)
def seeded(case: Case) -> None:
    """What a vector does not give must not matter, but it must be the same in every run."""
    torch.manual_seed(0)
