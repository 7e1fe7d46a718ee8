"""Pictures of a run: learning curves, confusion matrix, misclassified images.  Needs matplotlib; without a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


def draw_all(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    images: Tensor,
    names: list[str],
) -> None:
    """Every picture of one run.

    `lines`: of metrics.jsonl; `table` (K, K): the confusion matrix; `logits` (N, K), `labels` (N,) and `images`
    (N, 3, H, W) uint8: of the test split.
    """
    try:
        canvas(1, 1, 1)
    except ImportError:
        return  # a bare training machine: the numbers are in the record all the same
    curves(lines, folder / "learning_curves.png")
    confusion(table, names, folder / "confusion_matrix.png")
    mistakes(logits, labels, images, names, folder / "mistakes.png")


def curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss terms as they enter the sum, validation accuracy, learning rate; over epochs."""
    figure, (left, middle, right) = canvas(12, 3.6, 3)
    keys = dict.fromkeys(key for line in lines for key in line["values"])
    for key in keys:
        steps = [line["step"] for line in lines if key in line["values"]]
        values = [line["values"][key] for line in lines if key in line["values"]]
        if key.split("/")[0] not in ("val", "system", "papers_protocol") and "/raw/" not in key and "/" in key:
            left.plot(steps, values, label=key)
        elif key.endswith("top1"):
            middle.plot(steps, values, label=key)
        elif key == "lr":
            right.plot(steps, values, label=key)
    for axes, title in ((left, "loss terms (weighted)"), (middle, "accuracy (%)"), (right, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.legend(fontsize=7)
    figure.savefig(path)


def confusion(table: Tensor, names: list[str], path: Path) -> None:
    """Rows are true classes; shares of the row as colour, counts as text where there is room."""
    k = len(names)
    side = min(12.0, 2.5 + 0.35 * k)
    figure, (axes,) = canvas(side, side, 1)
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if k <= 30:
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
        for i in range(k):
            for j in range(k):
                if table[i, j]:
                    axes.text(
                        j, i, int(table[i, j]), ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.5 else "k"
                    )
    figure.savefig(path)


def mistakes(logits: Tensor, labels: Tensor, images: Tensor, names: list[str], path: Path, most: int = 32) -> None:
    """The misclassified images the network was surest of: true class, answer, confidence."""
    sure, guess = logits.softmax(1).max(1)
    wrong = torch.nonzero(guess != labels).flatten()
    wrong = wrong[sure[wrong].argsort(descending=True)][:most]
    columns = 8
    rows = max(1, -(-len(wrong) // columns))
    figure, grid = canvas(1.35 * columns, 1.7 * rows + 0.5, columns, rows, layout=None)
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, wrong.tolist(), strict=False):
        axes.imshow(images[i].permute(1, 2, 0).numpy())
        axes.set_title(f"{names[labels[i]]} → {names[guess[i]]}\n{100 * sure[i]:.0f} %", fontsize=7)
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - 0.9 / (1.7 * rows + 0.5), 0.1, 0.35)
    figure.suptitle(f"{int((guess != labels).sum())} of {len(labels)} test images wrong; true → answer", fontsize=9)
    figure.savefig(path)


def comparison(families: Mapping[str, Sequence[float]], path: Path) -> None:
    """Top-1 of every seed as a dot and their mean as a bar, a row per network."""
    try:
        figure, (axes,) = canvas(8, 1 + 0.4 * len(families), 1)
    except ImportError:
        return
    for row, values in enumerate(families.values()):
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.5)
        axes.plot([sum(values) / len(values)] * 2, [row - 0.3, row + 0.3], color="k")
    axes.set_yticks(range(len(families)), list(families))
    axes.invert_yaxis()
    axes.set_xlabel("test top-1 (%): dots are seeds, bars their means")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def canvas(
    width: float, height: float, columns: int, rows: int = 1, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Any, list[Any]]:
    """A figure and its axes, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
