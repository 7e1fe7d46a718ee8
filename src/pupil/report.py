"""The evaluate stage: every network of params.yaml, from what its training left; the test images are not read again.

Quality comes from the test predictions that each training saved; cost (parameters, MACs, bytes, latency) from the
network itself.  Over seeds: mean, standard deviation, and a verdict against the matched baseline.
"""

import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from pupil import checkpoint, figures, measures
from pupil.assemble import find
from pupil.config import HOME
from pupil.record import Record, environment, processor
from pupil.session import PREDICTIONS, dvc_tags, group, where_report
from pupil.settings import Settings
from pupil.tracking import Stream
from pupil.types import UserError

COLUMNS = ("top1", "top5", "nll", "ece", "agreement")


class Cell(NamedTuple):
    """One trained network of the pipeline."""

    family: str  # what is averaged over seeds
    baseline: str | None  # the family it is compared with
    teacher: Path | None  # whose predictions it should agree with
    seed: int
    folder: Path


def cells(s: Settings) -> list[Cell]:
    """The cells that params.yaml names; what else lies in out/ is not looked at."""
    root = Path("out/models")
    found = [Cell(t, None, None, s.teacher.seed, root / "teacher" / t) for t in s.teachers]
    found += [
        Cell(f"{t} (SH-KD, {n})", t if t in s.teachers else None, None, s.teacher.seed, root / "shkd" / f"{t}-{n}")
        for t in s.shkd
        for n in s.students
    ]
    found += [Cell(f"{n} alone", None, None, seed, root / "student" / n / str(seed)) for n in s.students for seed in s.seeds]
    for kind, teachers, mark in (("distill", s.teachers, ""), ("distill_shkd", s.shkd, " (SH-KD)")):
        for t in teachers:
            for n in s.students:
                teacher = root / "teacher" / t if kind == "distill" else root / "shkd" / f"{t}-{n}"
                found += [
                    Cell(f"{n} by {m} from {t}{mark}", f"{n} alone", teacher, seed, root / kind / f"{t}-{n}" / m / str(seed))
                    for m in s.methods
                    for seed in s.seeds
                ]
    return found


def write(settings: Settings, reports: Path = Path("reports")) -> None:
    """reports/: metrics.json and plots for DVC, networks.json with everything, table.md for people."""
    place, chosen = where_report(settings), cells(settings)
    missing = [str(c.folder) for c in chosen if not (find(str(c.folder)) / PREDICTIONS).exists()]
    if missing:
        raise UserError(f"{len(missing)} of {len(chosen)} networks are not trained yet, first {missing[0]}; run dvc repro")
    torch.manual_seed(0)
    costs: dict[str, dict[str, float]] = {}
    networks = [describe(cell, costs) for cell in chosen]
    families = summarise(networks)
    text = table(families)
    print(text)
    reports.mkdir(exist_ok=True)
    (reports / "metrics.json").write_text(json.dumps(metrics_tree(families), indent=1) + "\n")
    (reports / "networks.json").write_text(json.dumps(networks, indent=1) + "\n")
    (reports / "table.md").write_text(text + "\n")
    write_csv(reports / "accuracy.csv", ("network", "seed", "top1"), [(n["family"], n["seed"], n["top1"]) for n in networks])
    classes = [(n["family"], n["seed"], c, a) for n in networks for c, a in n["per_class"].items()]
    write_csv(reports / "per_class.csv", ("network", "seed", "class", "accuracy"), classes)
    track(settings, families, networks, reports, place)


def describe(cell: Cell, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Everything measured of one network."""
    folder = find(str(cell.folder))
    net, meta = checkpoint.load(folder)
    saved = load_file(folder / PREDICTIONS)
    logits, labels = saved["deployed"], saved["labels"]
    row: dict[str, Any] = {"family": cell.family, "baseline": cell.baseline, "seed": cell.seed, "folder": str(cell.folder)}
    row |= {"network": meta["network"], "method": meta["method"], "epoch": meta["epoch"], "selection": meta["selection"]}
    row |= measures.quality(logits, labels)
    row["last/top1"] = measures.quality(saved["last"], labels)["top1"]
    row["best_by_val/top1"] = measures.quality(saved["best_by_val"], labels)["top1"]
    if cell.teacher is not None:
        row["agreement"] = measures.agreement(logits, load_file(find(str(cell.teacher)) / PREDICTIONS)["deployed"])
    row["per_class"] = dict(zip(meta["classes"], measures.per_class(logits, labels), strict=True))
    row["bytes"] = (folder / checkpoint.WEIGHTS).stat().st_size
    architecture = json.dumps([meta["network"], meta["method"], meta["surgery"], meta["image_size"]])
    if architecture not in costs:  # equal for every seed
        costs[architecture] = cost(net, meta["image_size"])
    return row | costs[architecture]


def cost(net: torch.nn.Module, size: int) -> dict[str, float]:
    values: dict[str, float] = {"parameters": measures.parameters(net), "macs": measures.macs(net, size)}
    for batch in (1, 64):
        for name, value in measures.latency(net, size, batch).items():
            values[f"cpu_batch{batch}_{name}"] = value
    return values


def summarise(networks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """family -> mean, deviation and number of every measure, cost, and the verdict against the baseline."""
    families: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(n["family"] for n in networks):
        members = sorted((n for n in networks if n["family"] == name), key=lambda n: n["seed"])
        row: dict[str, Any] = {c: measures.spread([m[c] for m in members]) for c in COLUMNS if c in members[0]}
        for key in (
            "parameters",
            "macs",
            "bytes",
            "cpu_batch1_median_ms",
            "cpu_batch1_p95_ms",
            "cpu_batch64_median_ms",
            "cpu_batch64_p95_ms",
        ):
            row[key] = statistics.median(m[key] for m in members)
        row["method"] = members[0]["method"]
        rivals = sorted((n for n in networks if n["family"] == members[0]["baseline"]), key=lambda n: n["seed"])
        if rivals and members[0]["method"] is not None:
            row["verdict"] = measures.verdict([m["top1"] for m in members], [r["top1"] for r in rivals])._asdict()
        families[name] = row
    return families


def metrics_tree(families: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | str]]:
    """What `dvc metrics show` and `dvc metrics diff` read: few, rounded numbers."""
    tree = {}
    for name, row in families.items():
        tree[name] = {
            "top1": round(row["top1"]["mean"], 2),
            "std": round(row["top1"]["std"], 2),
            "ece": round(row["ece"]["mean"], 2),
        }
        if "verdict" in row:
            tree[name] |= {"gain": round(row["verdict"]["difference"], 2), "verdict": row["verdict"]["word"]}
    return tree


def table(families: dict[str, dict[str, Any]]) -> str:
    """A Markdown table that reads well in a terminal."""
    head = ["network", "seeds", "top-1 %", "gain", "verdict", "NLL", "ECE %", "agrees %", "params", "MMACs", "CPU ms b1 / b64"]
    rows = [head]
    for name, row in families.items():
        top1, v = row["top1"], row.get("verdict")
        gain = f"{v['difference']:+.2f}" if v else ""
        word = "" if not v else v["word"] if math.isnan(v["p"]) else f"{v['word']} (p={v['p']:.3f})"
        rows.append(
            [
                name,
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
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    note = (
        f"gain: against the same student alone, same seeds and batches; verdict: paired two-sided t-test over seeds at 5 %."
        f"\nms: median of one forward pass, {torch.get_num_threads()} threads of {processor()}."
    )
    return "\n".join(lines) + "\n\n" + note


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([head, *rows])


def track(
    settings: Settings, families: dict[str, dict[str, Any]], networks: Sequence[dict[str, Any]], reports: Path, folder: Path
) -> None:
    """A record of the comparison, so that MLflow has all of it too."""
    names = dict.fromkeys(n["family"] for n in networks)
    facts = {
        "stage": "evaluate",
        "name": "evaluate",
        "params": {"teachers": ", ".join(settings.teachers), "students": ", ".join(settings.students)}
        | {
            "methods": ", ".join(settings.methods),
            "seeds": ", ".join(map(str, settings.seeds)),
            "shkd": ", ".join(settings.shkd),
        },
        "seeds": {},
        "inputs": {n["folder"]: checkpoint.read_meta(find(n["folder"]))["sha256"] for n in networks},
        "environment": environment("cpu"),
        "group": group(settings.data.name),
        "tags": dvc_tags()
        | {f"verdict {metric_name(name)}": row["verdict"]["word"] for name, row in families.items() if "verdict" in row},
        "teacher": None,
        "data": None,
        "model": None,
    }
    stream = Stream(folder, HOME, settings.experiment)
    record = Record(folder, facts, stream.changed)
    figures.comparison(
        {name: [n["top1"] for n in networks if n["family"] == name] for name in names}, record.artifacts / "comparison.png"
    )
    for path in reports.iterdir():
        if path.suffix in (".json", ".csv", ".md"):
            (record.artifacts / path.name).write_bytes(path.read_bytes())
    record.finish(summary(families), {})
    stream.close()


def summary(families: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every number of the comparison under names that MLflow takes: family/measure."""
    final = {}
    for name, row in families.items():
        key = metric_name(name)
        for measure, value in row.items():
            if measure in COLUMNS:
                final |= {f"{key}/{measure}_{part}": value[part] for part in ("mean", "std")}
            elif measure == "verdict":
                final |= {f"{key}/gain": value["difference"]} | (
                    {} if math.isnan(value["p"]) else {f"{key}/gain_p": value["p"]}
                )
            elif measure != "method":
                final[f"{key}/{measure}"] = value
    return final


def metric_name(family: str) -> str:
    """MLflow allows letters, digits and a few marks, not those of "(SH-KD)"."""
    return re.sub(r"[^\w\-. ]", "", family)
