"""train_teacher, train_student (the matched baseline) and retrain_teacher (SH-KD): a network on labels, or an import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import pupil.needed  # noqa: F401
from pupil import assemble, imported, session
from pupil.config import launch
from pupil.settings import Settings


def main(settings: Settings) -> None:
    data = assemble.prepared(settings)
    if assemble.pattern(settings) is not None:
        imported.run(settings, data)
    else:
        session.run([[assemble.single(settings, data)]], data, settings)


if __name__ == "__main__":
    launch(main)
