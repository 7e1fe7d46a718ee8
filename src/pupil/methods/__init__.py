"""The table of methods."""

from pupil.methods.ab import AB
from pupil.methods.at import AT
from pupil.methods.base import Method
from pupil.methods.cc import CC
from pupil.methods.crd import CRD
from pupil.methods.crdth import CRDTH
from pupil.methods.cskd import CSKD
from pupil.methods.ctkd import CTKD
from pupil.methods.dist import DIST
from pupil.methods.dkd import DKD
from pupil.methods.fitnet import FitNet
from pupil.methods.fsp import FSP
from pupil.methods.ft import FT
from pupil.methods.kd import KD
from pupil.methods.kde import KDE
from pupil.methods.kdeth import KDETH
from pupil.methods.kdmse import KDMSE
from pupil.methods.kdsvd import KDSVD
from pupil.methods.ls import LS
from pupil.methods.mlkd import MLKD
from pupil.methods.nkd import NKD
from pupil.methods.nst import NST
from pupil.methods.ofd import OFD
from pupil.methods.pkt import PKT
from pupil.methods.refilled import REFILLED
from pupil.methods.reviewkd import ReviewKD
from pupil.methods.rkd import RKD
from pupil.methods.sakd import SAKD
from pupil.methods.semckd import SemCKD
from pupil.methods.simkd import SimKD
from pupil.methods.sp import SP
from pupil.methods.srrl import SRRL
from pupil.methods.thkd import THKD
from pupil.methods.uskd import USKD
from pupil.methods.vid import VID
from pupil.methods.wttm import WTTM

METHODS: dict[str, type[Method]] = {
    "kd": KD,
    "kdmse": KDMSE,
    "dkd": DKD,
    "nkd": NKD,
    "dist": DIST,
    "wttm": WTTM,
    "ls": LS,
    "ctkd": CTKD,
    "mlkd": MLKD,
    "uskd": USKD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "cc": CC,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "ab": AB,
    "ft": FT,
    "fsp": FSP,
    "nst": NST,
    "kdsvd": KDSVD,
    "crd": CRD,
    "srrl": SRRL,
    "semckd": SemCKD,
    "simkd": SimKD,
    "thkd": THKD,
    "kde": KDE,
    "kdeth": KDETH,
    "crdth": CRDTH,
    "cskd": CSKD,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "sakd": SAKD,
    "refilled": REFILLED,
}
