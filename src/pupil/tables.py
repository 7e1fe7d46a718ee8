"""The comparison as text: one row per family of networks, and the accuracy of each class side by side."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pupil.record import processor


def other_classes(networks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """family -> its classes in words, where they are not those of the students: a teacher of another task."""
    lists = {n["family"]: list(n["per_class"]) for n in networks}
    others = {family: names for family, names in lists.items() if names != list(networks[-1]["per_class"])}
    return {f: f"{len(names)} classes: {', '.join(names[:5])}{', ...' * (len(names) > 5)}" for f, names in others.items()}


def table(families: dict[str, dict[str, Any]], others: Mapping[str, str], told: Mapping[str, str] = {}) -> str:
    """A Markdown table that reads well in a terminal.

    `others`: of families with classes of their own, those in words; `told`: published numbers.
    """
    head = ["network", "seeds", "top-1 %", "gain", "verdict", "NLL", "ECE %", "agrees %", "params", "MMACs", "CPU ms b1 / b64"]
    rows = [head]
    for name, row in families.items():
        top1, v = row["top1"], row.get("verdict")
        gain = f"{v['difference']:+.2f}" if v else ""
        word = "" if not v else v["word"] if math.isnan(v["p"]) else f"{v['word']} (p={v['p']:.3f})"
        word += "" if row.get("matched", True) else ", imported baseline"
        shown = name + (", imported" if "imported" in row else "")
        rows.append(
            [
                f"{shown} [{others[name]}]" if name in others else shown,
                str(top1["n"]),
                f"{top1['mean']:.2f} ± {top1['std']:.2f}" if top1["n"] > 1 else f"{top1['mean']:.2f}",
                gain,
                word,
                f"{row['nll']['mean']:.3f}",
                f"{row['ece']['mean']:.1f}",
                f"{row['agreement']['mean']:.1f}" if "agreement" in row else "",
                f"{row['parameters']:,.0f}",
                f"{row['macs'] / 1e6:.1f}",
                f"{row['cpu_batch1_median_ms']:.1f} / {row['cpu_batch64_median_ms']:.0f}",
            ]
        )
    if told:
        for row, text in zip(rows, ["published", *(told.get(name, "") for name in families)], strict=True):
            row.insert(3, text)
    note = (
        f"gain: against the same student alone, same seeds and batches; verdict: paired two-sided t-test over seeds at 5 %."
        f"\nms: median of one forward pass, {torch.get_num_threads()} threads of {processor()}."
    )
    if not all(row.get("matched", True) for row in families.values()):
        note += "\nimported baseline: not trained here; neither its budget nor its seeds are those of the taught students."
    if others:
        note += (
            "\n[...]: other classes than the students'; accuracy on the test images of those, not to be compared with theirs."
        )
    if any("cut" in row for row in families.values()):
        note += "\ncut to classes: of the same teacher, the outputs of the students' classes alone, on their test images."
    return lined(rows) + "\n\n" + note


def each_class(networks: Sequence[dict[str, Any]], others: Mapping[str, str]) -> str:
    """A Markdown table: the students' classes down, the networks that know no others across; means over seeds."""
    families: dict[str, list[dict[str, Any]]] = {}
    for network in networks:
        if network["family"] not in others:
            families.setdefault(network["family"], []).append(network)
    rows = [["accuracy in %", *families]]
    for name in networks[-1]["per_class"]:
        means = (statistics.fmean(n["per_class"][name] for n in members) for members in families.values())
        rows.append([name, *(f"{mean:.1f}" for mean in means)])
    return lined(rows)


def lined(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is aligned; the first row is its head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
