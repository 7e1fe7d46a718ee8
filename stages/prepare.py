"""prepare: a data set -> few large files and a manifest, in `out`, and a record of what is in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import pupil.needed  # noqa: F401
from pupil import preparation
from pupil.config import launch
from pupil.settings import Settings


def main(settings: Settings) -> None:
    settings.refuse_unused("data")
    preparation.run(settings)


if __name__ == "__main__":
    launch(main)
