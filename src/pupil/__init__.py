"""pupil: a knowledge-distillation workbench for image classifiers."""

import os

# Before torch is imported: its idle threads (GNU OpenMP) soon sleep instead of spinning.  Two trainings on the same
# cores otherwise slow each other down many times over; a training that has the cores for itself loses nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
