"""The table of methods."""

from pupil.methods.base import Method
from pupil.methods.crd import CRD
from pupil.methods.fitnet import FitNet
from pupil.methods.kd import KD
from pupil.methods.simkd import SimKD
from pupil.methods.thkd import THKD

METHODS: dict[str, type[Method]] = {
    "kd": KD,
    "fitnet": FitNet,
    "simkd": SimKD,
    "thkd": THKD,
    "crd": CRD,
}
