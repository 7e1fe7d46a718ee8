"""Measures against formulas written out, counts done by hand, and scipy."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from pupil import measures
from pupil.models import build
from pupil.net import FrozenLinear


def random_case(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, k, generator=g), torch.randint(k, (n,), generator=g)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z - max(row)) for z in row)
    return [math.exp(z - max(row)) / total for z in row]


def hit(row: list[float], label: int, among: int) -> bool:
    """Is the label one of the `among` highest?"""
    return sum(z > row[label] for z in row) < among


def slow_ece(rows: list[list[float]], labels: list[int], bins: int = 15) -> float:
    """sum_b |b| / n * |accuracy(b) - confidence(b)|, bin b of confidences in (b / bins, (b + 1) / bins]."""
    found = 0.0
    for b in range(bins):
        inside = [(p, y) for p, y in zip(map(softmax, rows), labels, strict=True) if b / bins < max(p) <= (b + 1) / bins]
        if inside:
            accuracy = sum(p.index(max(p)) == y for p, y in inside) / len(inside)
            confidence = sum(max(p) for p, _ in inside) / len(inside)
            found += len(inside) / len(rows) * abs(accuracy - confidence)
    return found


@pytest.mark.parametrize(("n", "k"), [(57, 10), (40, 5), (33, 3), (1, 2), (20, 100)])
def test_quality_agrees_with_the_formulas_written_out(n: int, k: int) -> None:
    logits, labels = random_case(n, k, seed=n)
    rows, truth = logits.double().tolist(), labels.tolist()
    assert measures.quality(logits, labels) == {
        "top1": pytest.approx(100 * sum(hit(r, y, 1) for r, y in zip(rows, truth, strict=True)) / n),
        "top5": pytest.approx(100 * sum(hit(r, y, 5) for r, y in zip(rows, truth, strict=True)) / n),
        "nll": pytest.approx(-sum(math.log(softmax(r)[y]) for r, y in zip(rows, truth, strict=True)) / n),
        "ece": pytest.approx(100 * slow_ece(rows, truth)),
    }


def test_top5_of_fewer_than_five_classes_is_all() -> None:
    logits, labels = random_case(30, 4, seed=0)
    assert measures.quality(logits, labels)["top5"] == 100.0


def test_calibration_error_of_an_example_by_hand() -> None:
    """Two samples of confidence 0.9, one right; two of 0.6, both right: (2 * |0.5 - 0.9| + 2 * |1 - 0.6|) / 4 = 0.4."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]], dtype=torch.float64).log()
    labels = torch.tensor([0, 1, 0, 1])
    assert measures.calibration_error(logits, labels) == pytest.approx(0.4)


def test_certain_and_right_is_perfectly_calibrated() -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert measures.calibration_error(logits, torch.tensor([0, 1])) == 0.0
    assert measures.calibration_error(logits, torch.tensor([1, 0])) == 1.0


def answers(*classes: int, k: int) -> Tensor:
    return torch.eye(k)[list(classes)]


def test_confusion_has_truth_in_rows_and_answers_in_columns() -> None:
    table = measures.confusion(answers(0, 1, 1, 2, 2, k=4), torch.tensor([0, 0, 1, 2, 1]))
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_per_class_accuracy_of_an_absent_class_is_no_number() -> None:
    found = measures.per_class(answers(0, 1, 1, 2, 2, k=4), torch.tensor([0, 0, 1, 2, 1]))
    assert found[:3] == [50.0, 50.0, 100.0]
    assert math.isnan(found[3])


def test_agreement_is_the_share_of_equal_answers() -> None:
    a, b = answers(0, 1, 2, 0, k=3), 5 * answers(0, 1, 1, 2, k=3)
    assert measures.agreement(a, b) == 50.0
    assert measures.agreement(a, a) == 100.0


# --- cost -----------------------------------------------------------------------------------------------------------------


def conv(c_in: int, c_out: int, kernel: int, side: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a convolution without bias that gives side x side."""
    return c_in * c_out * kernel**2, c_in * c_out * kernel**2 * side**2


def test_parameters_and_macs_of_resnet8_are_those_counted_by_hand() -> None:
    convs = [conv(3, 16, 3, 32), conv(16, 16, 3, 32), conv(16, 16, 3, 32)]
    convs += [conv(16, 32, 3, 16), conv(32, 32, 3, 16), conv(16, 32, 1, 16)]
    convs += [conv(32, 64, 3, 8), conv(64, 64, 3, 8), conv(32, 64, 1, 8)]
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    net = build("resnet8", 10).eval()
    assert measures.parameters(net) == sum(p for p, _ in convs) + norms + 64 * 10 + 10 == 78042
    assert measures.macs(net, 32) == sum(m for _, m in convs) + 64 * 10 == 12501632


def test_a_frozen_classifier_is_counted() -> None:
    net, frozen = build("resnet8", 10), build("resnet8", 10)
    frozen.head = FrozenLinear.of(frozen.head)
    assert measures.parameters(frozen) == measures.parameters(net)


def test_latency_is_positive_and_its_tail_is_no_shorter_than_its_median() -> None:
    found = measures.latency(nn.Conv2d(3, 4, 3), 8, batch=2, runs=7, warm_up=1)
    assert 0 < found["median_ms"] <= found["p95_ms"]


# --- comparisons ----------------------------------------------------------------------------------------------------------

BASELINE = [88.1, 88.4, 87.9, 88.2]


@pytest.mark.parametrize(
    ("gains", "word"),
    [([0.9, 1.1, 1.0, 1.2], "BEATS"), ([-0.9, -1.1, -1.0, -1.2], "LOSES"), ([0.5, -0.4, 0.1, -0.3], "TIES")],
)
def test_verdict_is_that_of_a_paired_t_test(gains: list[float], word: str) -> None:
    method = [b + g for b, g in zip(BASELINE, gains, strict=True)]
    found = measures.verdict(method, BASELINE)
    mean, n = sum(gains) / 4, 4
    t = mean / math.sqrt(sum((g - mean) ** 2 for g in gains) / (n - 1) / n)
    assert found == (word, pytest.approx(mean), pytest.approx(2 * stats.t.sf(abs(t), n - 1)))
    assert found.p == pytest.approx(stats.ttest_rel(method, BASELINE).pvalue)


def test_verdict_changes_at_the_level() -> None:
    method = [b + g for b, g in zip(BASELINE, [0.1, 1.0, 0.4, 0.9], strict=True)]
    p = measures.verdict(method, BASELINE).p
    assert measures.verdict(method, BASELINE, level=p * 1.01).word == "BEATS"
    assert measures.verdict(method, BASELINE, level=p * 0.99).word == "TIES"


def test_one_seed_allows_no_verdict() -> None:
    found = measures.verdict([90.0], [88.0])
    assert found[:2] == ("one seed", 2.0)
    assert math.isnan(found.p)


@pytest.mark.parametrize(("gain", "word", "p"), [(0.5, "BEATS", 0.0), (-0.5, "LOSES", 0.0), (0.0, "TIES", 1.0)])
def test_equal_differences_are_decided_by_their_sign(gain: float, word: str, p: float) -> None:
    baseline = [50.0, 60.0, 70.5]
    assert measures.verdict([b + gain for b in baseline], baseline) == (word, gain, p)


def test_verdict_needs_the_same_seeds_on_both_sides() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        measures.verdict([1.0, 2.0], [1.0])


def test_spread_is_mean_and_sample_deviation() -> None:
    assert measures.spread([1.0, 2.0, 4.0]) == {"mean": pytest.approx(7 / 3), "std": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert measures.spread([3.0]) == {"mean": 3.0, "std": 0.0, "n": 1}
