"""Options and limits of all tests."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: several threads on a busy machine are many times slower than one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder with golden vectors (npz); every case in it is checked (default: tests/golden)",
    )
