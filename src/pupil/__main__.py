"""The command line: python -m pupil list | check | pipeline | sync | resolve | import."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from pupil.config import HOME, launch_with, load_settings, user_errors
from pupil.record import find, read
from pupil.settings import plain


def main() -> None:
    args = arguments()
    with user_errors():
        match args.command:
            case "list":
                print_tables()
            case "check":
                from pupil.inspection import check as inspect

                launch_with(args.overrides, inspect)
            case "pipeline":
                sys.exit(pipeline())
            case "sync":
                synchronise(args.folders)
            case "import":
                from pupil.adopt import adopt

                adopt(args.file, args.arch, args.data, args.classes, args.teacher, args.out)
            case "resolve":
                launch_with(
                    args.overrides, lambda s: print(json.dumps({k: v for k, v in plain(s).items() if k != "given"}, indent=1))
                )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pupil", description="A knowledge-distillation workbench for image classifiers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("list", help="methods, networks and data sets, with their papers")
    check = commands.add_parser("check", help="build everything that params.yaml asks for, without training")
    check.add_argument("overrides", nargs="*", help="key=value, such as 'methods=[thkd]'")
    commands.add_parser("pipeline", help="check, dvc repro, sync, and the table of results")
    sync = commands.add_parser("sync", help="give every run record a run in MLflow; adds nothing twice")
    sync.add_argument("folders", nargs="*", type=Path, help="where records are; by default those of this checkout")
    resolve = commands.add_parser("resolve", help="print the whole configuration as JSON, for a machine without Hydra")
    resolve.add_argument("overrides", nargs="*")
    published = commands.add_parser("import", help="make a published checkpoint a model folder that can teach")
    published.add_argument("file", type=Path, help=".pth, .pt, .tar, .model or .safetensors")
    published.add_argument("--arch", help="its network, as in `list`; needed unless the file names it")
    published.add_argument("--data", help="folder of prepared data (class names, size, mean, std) or a data set's name")
    published.add_argument("--classes", type=Path, help="JSON file with the class names; else those of --data, else 0, 1, ...")
    published.add_argument("--teacher", help="SimKD students: the model folder whose classifier they use")
    published.add_argument("--out", type=Path, help="the model folder to write; by default one below runs/")
    return parser.parse_args()


def print_tables() -> None:
    import torch

    from pupil.data import SOURCES
    from pupil.methods import METHODS
    from pupil.models import NETWORKS

    print("methods")
    for name, method in METHODS.items():
        idea = (sys.modules[method.__module__].__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")
        print(f"  {name:10} {idea}  [{method.paper}]")
    print("networks (name, parameters for 100 classes)")
    for name, build in NETWORKS.items():
        with torch.device("meta"):  # counted, not drawn: some are large
            net = build(100)
        print(f"  {name:27} {sum(p.numel() for p in net.parameters()):>12,}")
    print("data sets")
    for name, source in SOURCES.items():
        print(f"  {name:18} {source.about}")


def pipeline() -> int:
    """`dvc repro` between a check and a sync; what a user types `make` for."""
    from pupil.inspection import check

    settings = load_settings()
    check(settings)
    print(flush=True)
    started = time.time()
    status = subprocess.run(["dvc", "repro"], cwd=HOME).returncode
    synchronise([])
    trained = [f for f in find([HOME / "out" / "records"]) if read(f)["started"] >= started]
    networks = sum(read(f)["stage"] != "evaluate" for f in trained)
    print(
        f"{networks} networks were trained now" if networks else "nothing was trained: every result was there or in DVC's cache"
    )
    table = HOME / "reports" / "table.md"
    if status == 0 and table.exists():
        print(f"\n{table.read_text()}", end="")
    return status


def synchronise(folders: list[Path]) -> None:
    from pupil.tracking import sync

    roots = folders or [folder for folder in (HOME / "out" / "records", HOME / "runs") if folder.exists()]
    created, completed, present = sync(roots, HOME, load_settings().experiment)
    print(f"MLflow: {created} runs created, {completed} completed, {present} were there")


if __name__ == "__main__":
    main()
