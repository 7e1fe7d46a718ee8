"""Pictures of a run: learning curves, confusion matrix, misclassified images.  Needs matplotlib; without a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pupil.methods.base import Chart, Pictures


def draw_all(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    images: Tensor,
    names: list[str],
    observed: Mapping[str, Tensor] = {},
    pictures: Pictures | None = None,
    train: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Every picture of one run.

    `lines`: of metrics.jsonl; `table` (K, K): the confusion matrix; `logits` (N, K), `labels` (N,) and `images`
    (N, 3, H, W) uint8: of the test split; `observed`: what the method shows of itself, matrices among it; `pictures`: what
    it shows at the end, some of the images and labels of `train`.
    """
    try:
        canvas(1, 1, 1)
    except ImportError:
        return  # a bare training machine: the numbers are in the record all the same
    if lines:
        curves(lines, folder / "learning_curves.png")
    confusion(table, names, folder / "confusion_matrix.png")
    mistakes(logits, labels, images, names, folder / "mistakes.png")
    for name, matrix in observed.items():
        if matrix.dim() == 2:
            heat(matrix.float().cpu(), name, folder / f"{name}.png")
    for name, picture in (pictures or {}).items():
        if isinstance(picture, Chart):
            matrix = picture.matrix.float().cpu()
            heat(matrix, picture.title, folder / f"{name}.png", picture.rows, picture.columns, picture.limits)
        elif train is not None:
            labelled = zip(train[1][picture.ids].tolist(), picture.captions, strict=True)
            captions = [f"{names[label]}\n{caption}" for label, caption in labelled]
            sheet([train[0][i] for i in picture.ids.tolist()], captions, picture.title, folder / f"{name}.png")


def curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss terms as they enter the sum, validation accuracy, learning rate; over epochs."""
    figure, (left, middle, right) = canvas(12, 3.6, 3)
    keys = dict.fromkeys(key for line in lines for key in line["values"])
    terms = {key.replace("/raw/", "/") for key in keys if "/raw/" in key}
    for key in keys:
        steps = [line["step"] for line in lines if key in line["values"]]
        values = [line["values"][key] for line in lines if key in line["values"]]
        if key in terms or key.endswith("/loss"):
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


def heat(
    matrix: Tensor,
    title: str,
    path: Path,
    rows: Sequence[str] = (),
    columns: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """A matrix (H, W) as colours, with its numbers where there is room; names of the rows, what the columns are."""
    h, w = matrix.shape
    low, high = limits or (matrix.min().item(), matrix.max().item())
    figure, (axes,) = canvas(max(3.0, min(10.0, 1.2 + 0.5 * w)), max(2.5, min(10.0, 1.0 + 0.5 * h)), 1)
    place = (0.5, w + 0.5, h - 0.5, -0.5) if columns else None  # columns are counted from 1
    image = axes.imshow(
        matrix.numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto" if columns else "equal", extent=place
    )
    figure.colorbar(image, ax=axes)
    axes.set_title(title.replace("_", " "), fontsize=9)
    axes.set_xlabel(columns)
    if rows:
        axes.set_yticks(range(h), rows)
    if matrix.numel() <= 100:
        for i in range(h):
            for j in range(w):
                at, dark = (j + 1 if columns else j), matrix[i, j] <= (low + high) / 2
                axes.text(at, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.savefig(path)


def mistakes(logits: Tensor, labels: Tensor, images: Tensor, names: list[str], path: Path, most: int = 32) -> None:
    """The misclassified images the network was surest of: true class, answer, confidence."""
    sure, guess = logits.softmax(1).max(1)
    wrong = torch.nonzero(guess != labels).flatten()
    wrong = wrong[sure[wrong].argsort(descending=True)][:most]
    about = [f"{names[labels[i]]} → {names[guess[i]]}\n{100 * sure[i]:.0f} %" for i in wrong.tolist()]
    title = f"{int((guess != labels).sum())} of {len(labels)} test images wrong; true → answer"
    sheet([images[i] for i in wrong.tolist()], about, title, path)


def sheet(images: Sequence[Tensor], captions: Sequence[str], title: str, path: Path, columns: int = 8) -> None:
    """Images (3, H, W), each with two lines above it."""
    rows = max(1, -(-len(images) // columns))
    figure, grid = canvas(1.35 * columns, 1.7 * rows + 0.5, columns, rows, layout=None)
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=7)
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - 0.9 / (1.7 * rows + 0.5), 0.1, 0.35)
    figure.suptitle(title, fontsize=9)
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


def similarity(pairs: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Cosines (K,) of each class's weights in two classifiers, a row per pair, with their mean."""
    try:
        k, n = len(classes), len(pairs)
        figure, (axes,) = canvas(5 + min(14.0, 0.45 * k), 1.6 + 0.35 * n, 1)
    except ImportError:
        return
    values = torch.stack([row.float() for row in pairs.values()])
    image = axes.imshow(values.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_title("cosine of the weights of each class in two classifiers", fontsize=9)
    axes.set_yticks(range(n), [f"{name}: mean {row.mean():.2f}" for name, row in pairs.items()], fontsize=8)
    if k <= 30:
        axes.set_xticks(range(k), list(classes), rotation=90, fontsize=8)
        for i in range(n):
            for j in range(k):
                color = "w" if abs(values[i, j]) > 0.6 else "k"
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    else:
        axes.set_xlabel("class")
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
