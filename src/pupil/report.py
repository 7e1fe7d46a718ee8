"""The evaluate stage: every network of params.yaml, from what its training left; the test images are not read again.

Over seeds: mean, standard deviation, and a verdict against the matched baseline.
"""

import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pupil import checkpoint, distributed, figures, measures, similarity
from pupil.assemble import find
from pupil.config import HOME
from pupil.opening import dvc_tags, group
from pupil.places import PREDICTIONS, where_report
from pupil.recipes import told
from pupil.record import Record, environment
from pupil.rows import cells, describe_all
from pupil.settings import Settings
from pupil.tables import each_class, other_classes, table
from pupil.tracking import Stream
from pupil.types import UserError

COLUMNS = ("top1", "top5", "nll", "ece", "agreement")
COSTS = ("parameters", "macs", "bytes", *(f"cpu_batch{n}_{part}_ms" for n in (1, 64) for part in ("median", "p95")))


def write(settings: Settings, reports: Path = Path("reports")) -> None:
    """reports/: metrics.json and plots for DVC, networks.json with everything, table.md for people."""
    distributed.refuse("evaluate")
    place, chosen = where_report(settings), cells(settings)
    missing = [str(c.folder) for c in chosen if not (find(str(c.folder)) / PREDICTIONS).exists()]
    if missing:
        raise UserError(f"{len(missing)} of {len(chosen)} networks are not trained yet, first {missing[0]}; run dvc repro")
    torch.manual_seed(0)
    networks = describe_all(chosen)
    families, others = summarise(networks), other_classes(networks)
    text = table(families, others, told(settings.recipe))
    if any("cut" in row for row in families.values()):
        text += "\n\n" + each_class(networks, others)
    print(text)
    reports.mkdir(exist_ok=True)
    (reports / "metrics.json").write_text(json.dumps(metrics_tree(families), indent=1) + "\n")
    (reports / "networks.json").write_text(json.dumps(networks, indent=1) + "\n")
    (reports / "table.md").write_text(text + "\n")
    write_csv(reports / "accuracy.csv", ("network", "seed", "top1"), [(n["family"], n["seed"], n["top1"]) for n in networks])
    classes = [(n["family"], n["seed"], c, a) for n in networks for c, a in n["per_class"].items()]
    write_csv(reports / "per_class.csv", ("network", "seed", "class", "accuracy"), classes)
    track(settings, families, networks, reports, place)


def summarise(networks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """family -> mean, deviation and number of every measure, cost, and the verdict against the baseline."""
    families: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(n["family"] for n in networks):
        members = sorted((n for n in networks if n["family"] == name), key=lambda n: n["seed"])
        different = list({m.get("imported", m["seed"]): m for m in members}.values())  # one file for all seeds is one network
        row: dict[str, Any] = {c: measures.spread([m[c] for m in different]) for c in COLUMNS if c in members[0]}
        for key in COSTS:
            row[key] = statistics.median(m[key] for m in members)
        row["method"] = members[0]["method"]
        if "imported" in members[0]:
            row["imported"] = len(different)
        if "cut" in members[0]:
            row["cut"] = True
        rivals = sorted((n for n in networks if n["family"] == members[0]["baseline"]), key=lambda n: n["seed"])
        if rivals and members[0]["method"] is not None:
            row["verdict"] = measures.verdict([m["top1"] for m in members], [r["top1"] for r in rivals])._asdict()
            row["matched"] = "imported" not in rivals[0]
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
        if "imported" in row:
            tree[name] |= {"imported": row["imported"]}
        if "verdict" in row:
            tree[name] |= {"gain": round(row["verdict"]["difference"], 2), "verdict": row["verdict"]["word"]}
    return tree


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
            "methods": ", ".join([*settings.methods, *(m for table in settings.tables for m in table.methods)]),
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
    similarity.draw(cells(settings), record.artifacts)
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
            elif measure not in ("method", "matched", "cut"):
                final[f"{key}/{measure}"] = value
    return final


def metric_name(family: str) -> str:
    """MLflow allows letters, digits and a few marks, not those of "(SH-KD)"."""
    return re.sub(r"[^\w\-. ]", "", family)
