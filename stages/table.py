"""table: several students of one teacher, trained side by side; seed after seed, if there are several."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import pupil.needed  # noqa: F401
from pupil import assemble, session
from pupil.config import launch
from pupil.settings import Settings


def main(settings: Settings) -> None:
    data = assemble.prepared(settings)
    session.run(assemble.table(settings, data), data, settings)


if __name__ == "__main__":
    launch(main)
