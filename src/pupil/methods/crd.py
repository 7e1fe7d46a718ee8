"""CRD: tell the teacher's view of the same image from its views of others, with memory banks.

Paper: Tian, Krishnan & Isola, ICLR 2020, arXiv:1910.10699.
Loss: ce * CE + kl * KL(T) + beta * (NCE of the student against the teacher's bank + the other way round), with
v = W e + b scaled to unit norm, P = exp(<bank[j], v> / tau) / Z, c = k / N and
NCE = -1/B sum_b [ ln(P_b0 / (P_b0 + c + eps)) + sum_j ln(c / (P_bj + c + eps)) ].
Z is N times the mean score of the first batch, and stays.  The positive, j = 0, is the image itself (`positive` exact)
or any image of its class (relax); the row that is then updated is the image's own.
Trained: the student and both embeddings W_s, W_t.  Deployed: the student.
Defaults: the authors' (beta 0.8, 128 dimensions, 16,384 negatives, tau 0.07, momentum 0.5).  Presets: crd+kd with kl 1, as
in simkd and spot-adaptive; mdistiller the same as the authors'; ctkd with ce 0.1 and kl 0.9.
Memory: two banks of N x dim numbers; `bank` float16 halves them.
Deviations: the k negatives are drawn on the device, per batch and with replacement (the authors': on the host and
without, where there are enough images); the graph that their first batch leaves on Z is cut.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pupil.methods.contrast import Contrast


class CRD(Contrast):
    paper = "Tian et al., ICLR 2020, arXiv:1910.10699"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "crd+kd": {"kl": 1.0},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
        "ctkd": {"ce": 0.1, "kl": 0.9},
    }
