"""evaluate: every network of params.yaml compared; reports/ and a table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import pupil.needed  # noqa: F401
from pupil import report
from pupil.config import launch
from pupil.settings import Settings


def main(settings: Settings) -> None:
    settings.refuse_unused("teachers", "students", "methods", "seeds", "shkd")
    report.write(settings)


if __name__ == "__main__":
    launch(main)
