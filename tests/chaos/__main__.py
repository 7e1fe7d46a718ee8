"""python -m tests.chaos [--kills 50] [--seed 0] [--kinds TEXT] [--out FILE]: the long form, and its report."""

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.chaos.campaign import HEAD, Report, Siege
from tests.chaos.kinds import KINDS
from tests.chaos.lab import RESIZED, Lab


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only those with this text in their name")
    parser.add_argument("--out", type=Path, default=Path("out/chaos.md"))
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if given.kinds in kind.name]
    dice, started, lines, wrong, kills = random.Random(given.seed), time.monotonic(), [HEAD], 0, 0
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        lab = Lab(Path(root))
        if any(RESIZED[0] in kind.arguments for kind in kinds):
            lab.images()
        for i, kind in enumerate(kinds):
            share = given.kills * (i + 1) // len(kinds) - given.kills * i // len(kinds)
            siege = Siege(lab, kind)
            try:
                report = siege.run(share, dice)
            except AssertionError as e:
                report = Report(kind.name, siege.kills, siege.attempts, [" ".join(str(e).split())[-300:]])
                siege.clean()
            lines.append(str(report))
            print(report, flush=True)
            wrong, kills = wrong + bool(report.wrong), kills + len(report.kills)
        lab.close()
    lines += ["", f"{kills} kills of {len(kinds)} kinds, seed {given.seed}: {len(kinds) - wrong} end equal, {wrong} do not;"
              f" {time.monotonic() - started:.0f} s."]  # fmt: skip
    print("\n".join(lines[-2:]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
