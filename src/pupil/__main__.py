"""The command line, `python -m pupil`: list, explain, check, recipe, pipeline, sync, why, resolve, import, export, doctor."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from pupil.types import UserError


def main() -> None:
    args = arguments()
    if args.command == "doctor":  # works where the packages are not there
        from pupil.doctor import doctor

        sys.exit(doctor(Path(__file__).resolve().parents[2]))
    import pupil.needed  # noqa: F401
    from pupil.config import launch_with, user_errors
    from pupil.settings import plain

    with user_errors():
        match args.command:
            case "list":
                from pupil.cards import tables
                from pupil.combinations import lines

                for line in lines() if args.only == "combinations" else tables(args.only):
                    print(line, flush=True)
            case "explain":
                from pupil.cards import card, page

                print(page() if args.markdown else card(args.method), end="" if args.markdown else "\n")
            case "check":
                from pupil.inspection import check as inspect

                launch_with(args.overrides, inspect)
            case "recipe":
                from pupil.recipes import use

                use(args.name or None, args.show)
            case "pipeline":
                sys.exit(pipeline())
            case "sync":
                synchronise(args.folders)
            case "why":
                from pupil.lineage import why

                for line in why(args.run, args.command_only):
                    print(line)
            case "import":
                from pupil.adopt import adopt

                adopt(**{key: value for key, value in vars(args).items() if key != "command"})
            case "export":
                from pupil.standalone import export

                export(args.folder, args.out)
            case "resolve":
                launch_with(
                    args.overrides, lambda s: print(json.dumps({k: v for k, v in plain(s).items() if k != "given"}, indent=1))
                )


class Parser(argparse.ArgumentParser):
    """Mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `{self.prog} --help` says what there is\n")


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m pupil", description="A knowledge-distillation workbench for image classifiers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    tables = commands.add_parser("list", help="methods, networks and data sets, with their papers")
    for only in ("methods", "networks", "data", "combinations"):
        about = "what goes with what, tried (a minute)" if only == "combinations" else "these alone"
        tables.add_argument(f"--{only}", dest="only", action="store_const", const=only, help=about)
    explain = commands.add_parser("explain", help="a method's card: paper, loss, settings, presets")
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("method", nargs="?", help="as in `list`")
    which.add_argument("--markdown", action="store_true", help="all cards as a page: docs/methods.md")
    check = commands.add_parser("check", help="build everything that params.yaml asks for, without training")
    check.add_argument("overrides", nargs="*", help="key=value, such as 'methods=[thkd]'")
    recipe = commands.add_parser("recipe", help="write a published pair's recipe into params.yaml; alone: list all")
    recipe.add_argument("name", nargs="?", help="SYSTEM/TABLE/TEACHER-STUDENT; SYSTEM or SYSTEM/TABLE lists those")
    recipe.add_argument("--show", action="store_true", help="say what would change, and change nothing")
    commands.add_parser("pipeline", help="check, dvc repro, sync, and the table of results")
    sync = commands.add_parser("sync", help="give every run record a run in MLflow; adds nothing twice")
    sync.add_argument("folders", nargs="*", type=Path, help="where records are; by default those of this checkout")
    why = commands.add_parser("why", help="what a run was made of, what differs here, and the command that runs it again")
    why.add_argument("run", help="a record or model folder, an MLflow run id, a record's uid, or a row of reports/table.md")
    why.add_argument("--command", dest="command_only", action="store_true", help="print that command alone")
    resolve = commands.add_parser("resolve", help="print the whole configuration as JSON, for a machine without Hydra")
    resolve.add_argument("overrides", nargs="*")
    published = commands.add_parser("import", help="make a published checkpoint a model folder that can teach")
    published.add_argument(
        "file", type=Path, help=".pth, .pt, .tar, .model or .safetensors; a model folder of our own, with --mix"
    )
    published.add_argument("--arch", help="its network, as in `list`; needed unless the file names it")
    published.add_argument("--data", help="folder of prepared data (class names, size, mean, std) or a data set's name")
    published.add_argument("--classes", type=Path, help="JSON file with the class names; else those of --data, else 0, 1, ...")
    published.add_argument("--teacher", help="SimKD students, and --mix of our own: the teacher's model folder")
    published.add_argument("--part", help="another network of the file, such as `teacher` in mdistiller's")
    published.add_argument("--mix", type=float, help="students by thkd, kdeth, crdth: the share of the teacher's classifier")
    published.add_argument("--image-size", type=int, help="pixels, where the data set's own size is not meant")
    published.add_argument("--out", type=Path, help="the model folder to write; by default one below runs/")
    export = commands.add_parser(
        "export",
        help="make a trained network a folder that loads without this project",
        description="Writes student.safetensors (the keys of the network's own class), model.json, a load.py of 20 lines and,"
        " unless the network is torchvision's or timm's as it is, the few source files of its architecture; then lets another"
        " Python, which cannot import this project, load it and compares its answers.",
    )
    export.add_argument("folder", type=Path, help="the model folder, such as out/models/distill/wrn_16_1-resnet8/kd/0")
    export.add_argument("out", type=Path, help="the folder to write, new or empty; `python OUT/load.py IMAGE` classifies")
    commands.add_parser("doctor", help="look for what does not work on this machine, and say what mends it")
    return parser.parse_args()


def pipeline() -> int:
    """`dvc repro` between a check and a sync; what a user types `make` for."""
    from pupil.config import HOME, load_settings
    from pupil.inspection import check
    from pupil.trace import sound

    settings = load_settings()
    check(settings)
    print(flush=True)
    started = time.time()
    try:
        status = subprocess.run(["dvc", "repro"], cwd=HOME).returncode
    except FileNotFoundError:
        raise UserError("the command dvc is not on the PATH: `make setup`, then `source .venv/bin/activate`") from None
    synchronise([])
    trained = [found.facts for found in sound([HOME / "out" / "records"]) if found.facts.get("ended", 0) >= started]
    fresh = [facts for facts in trained if facts["stage"] not in ("prepare", "evaluate")]
    imported = sum("imported" in facts["params"] for facts in fresh)
    networks = len(fresh) - imported
    print(
        f"{networks} networks were trained now"
        if networks
        else "nothing was trained: every result was there or in DVC's cache",
        *([f"{imported} imported"] if imported else []),
        sep=", ",
    )
    table = HOME / "reports" / "table.md"
    if status == 0 and table.exists():
        print(f"\n{table.read_text()}", end="")
    return status


def synchronise(folders: list[Path]) -> None:
    from pupil.config import HOME, load_settings
    from pupil.tracking import sync

    if lost := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f"there is no folder {lost[0]}; give the folder of a record, or one above it")
    roots = folders or [folder for folder in (HOME / "out" / "records", HOME / "runs") if folder.exists()]
    created, completed, present = sync(roots, HOME, load_settings().experiment)
    print(f"MLflow: {created} runs created, {completed} completed, {present} were there")


if __name__ == "__main__":
    main()
