"""pupil: a knowledge-distillation workbench for image classifiers."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  (older ones come as far as this line)
    sys.stderr.write(
        f"error: pupil needs Python 3.11 or newer, {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]};"
        " `make setup` makes .venv with the right one\n"
    )
    sys.exit(2)

# Before torch is imported: its idle threads (GNU OpenMP) soon sleep instead of spinning.  Two trainings on the same
# cores otherwise slow each other down many times over; a training that has the cores for itself loses nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
