"""pupil: a knowledge-distillation workbench for image classifiers."""

import os

# Before torch is imported: its idle threads sleep instead of spinning.  Two trainings on the same cores, or one beside
# any other work, otherwise slow each other down many times over; a training that has the cores for itself loses nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
