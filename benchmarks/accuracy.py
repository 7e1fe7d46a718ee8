"""What the quick settings cost in accuracy, against the plain ones; prints a Markdown table, writes JSON.

python -m benchmarks.accuracy --train cifar10/train.zip --test cifar10/test.zip [--images 20000] [--epochs 5] [--seeds 3] \
    [--teacher resnet56] [--student resnet20] [--methods kd] [--threads 1] [--folder DIR] [--json accuracy.json]

Quick is what this machine is found to be good for (loader, precision, layout and compile `auto`); plain is worker processes
with Pillow, float32, contiguous tensors, eager networks.  One teacher, trained once, teaches both.  Every training is
one command, `python stages/distill.py`, as a user would give it; what is there already in --folder is not trained again.  The
difference is taken seed by seed, because a seed has the same first student and the same images in the same order on both sides.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import machine
from pupil.config import HOME

SIDES = {
    "quick": ["loader=auto", "precision=auto", "layout=auto", "compile=auto"],
    "plain": ["loader=workers", "precision=float32", "layout=contiguous", "compile=false"],
}


def main(args: list[str] | None = None) -> None:
    given = parser().parse_args(args)
    with tempfile.TemporaryDirectory() as made:
        folder = (given.folder or Path(made)).resolve()
        data = ["data.name=folder", f"data.path={given.train.resolve()}", f"data.test_path={given.test.resolve()}"]
        data += [f"data.image_size={given.size}", f"data.train_images={given.images}", "data.val_images=1000"]
        data += [f"data.test_images={given.test_images or 'null'}", "data.pad=4", "data.flip=true"]
        run(given, "prepare", folder / "data", data)
        common = [*data, f"prepared={folder / 'data'}"]
        teacher = [
            *common,
            "train.role=teacher",
            f"train.network={given.teacher}",
            *budget("teacher.optim", given.teacher_epochs),
        ]
        teacher += SIDES["quick"]
        run(given, "train", folder / "teacher", teacher)
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for method, seed, (side, how) in itertools.product(given.methods.split(","), range(given.seeds), SIDES.items()):
            cell = [f"distill.teacher={given.teacher}", f"distill.checkpoint={folder / 'teacher'}", f"distill.method={method}"]
            cell += [f"distill.student={given.student}", f"distill.seed={seed}", *budget("optim", given.epochs)]
            record = run(given, "distill", folder / side / method / str(seed), [*common, *cell, *how])
            found.setdefault(method, {}).setdefault(side, []).append(record)
        taught = json.loads((folder / "teacher-record" / "record.json").read_text())["final"]["test/top1"]
    rows = [row(method, sides) for method, sides in found.items()]
    print(f"{machine(torch.device('cpu'))}; {given.student} from {given.teacher} ({taught:.2f} %), {given.images:,} training")
    print(f"images, {given.epochs} epochs, {given.seeds} seeds; top-1 in percent on the test images after the last epoch\n")
    print("| method | quick | mean | plain | mean | quick minus plain, mean and standard deviation | deviation of plain |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        sides = [f"{' '.join(f'{top1:.2f}' for top1 in r[side])} | {statistics.mean(r[side]):.2f}" for side in SIDES]
        print(f"| {r['method']} | {' | '.join(sides)} | {r['difference']:+.2f}, {r['spread']:.2f} | {r['plain_spread']:.2f} |")
    if given.json:
        facts = {"machine": machine(torch.device("cpu")), "teacher_top1": taught, "rows": rows}
        about = {name: value if isinstance(value, int | str | None) else str(value) for name, value in vars(given).items()}
        given.json.write_text(json.dumps(facts | about, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--train", type=Path, required=True, help="training images: a folder, zip or tar.gz of class folders")
    made.add_argument("--test", type=Path, required=True, help="test images, the same way")
    made.add_argument("--size", type=int, default=32, help="pixels")
    made.add_argument("--images", type=int, default=20_000, help="to train on")
    made.add_argument("--test-images", type=int, help="all, if not given")
    made.add_argument("--teacher", default="resnet56")
    made.add_argument("--student", default="resnet20")
    made.add_argument("--methods", default="kd")
    made.add_argument("--teacher-epochs", type=int, default=8)
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--folder", type=Path, help="keep everything there, and go on from what is there")
    made.add_argument("--json", type=Path)
    return made


def budget(key: str, epochs: int) -> list[str]:
    return [f"{key}.epochs={epochs}", f"{key}.batch_size=64", f"{key}.lr=0.05", f"{key}.schedule=cosine"]


def run(given: argparse.Namespace, stage: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """The record of one command; not run where its result is there."""
    record = out.with_name(f"{out.name}-record")
    if not (out.exists() and (record / "record.json").exists()):
        command = [sys.executable, f"stages/{stage}.py", *overrides, f"out={out}", f"record={record}"]
        beside = {"OMP_NUM_THREADS": str(given.threads), "MLFLOW_TRACKING_URI": f"sqlite:///{out.parent / 'mlflow.db'}"}
        done = subprocess.run(command, cwd=HOME, env=os.environ | beside, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{stage} ended with {done.returncode}; what it said stands above")
    return json.loads((record / "record.json").read_text())


def row(method: str, sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    quick, plain = ([record["final"]["test/last/top1"] for record in sides[side]] for side in SIDES)
    apart = [a - b for a, b in zip(quick, plain, strict=True)]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (apart, plain)]
    seconds = {side: [record["ended"] - record["started"] for record in records] for side, records in sides.items()}
    found = {"method": method, "quick": quick, "plain": plain, "difference": statistics.mean(apart), "seconds": seconds}
    return found | {"spread": spreads[0], "plain_spread": spreads[1]}


if __name__ == "__main__":
    main()
