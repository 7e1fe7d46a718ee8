"""`make audit`: requirements.txt with its hashes against the known weaknesses of the packages, by pip-audit.

pip-audit calls it a success when it could ask about nothing (an index without PyPI's API, no network); here that is status 3.
python -m pupil.audit FILE COMMAND ...: the lock, and how pip-audit is started.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKED = re.compile(r"[\w.-]+(?:\[[^\]]*\])?==\S+(?: ;[^\\]*)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+")
WEAK, NOT_ASKED = 1, 3  # exit status


def audit(lock: Path, command: list[str]) -> int:
    """Prints what is known; 0: nothing against any of them."""
    blocks = [block for block in re.split(r"\n(?=\w)", lock.read_text().strip()) if not block.startswith("#")]
    if bare := [block.split("\n")[0] for block in blocks if not LOCKED.match(block)]:
        print(f"{len(bare)} of {len(blocks)} packages have no version or no hash, first {bare[0]}: make lock")
        return WEAK
    print(f"{lock.name}: {len(blocks)} packages, each of one version and with its hashes", flush=True)
    found, said = asked(lock, command)
    if found is None:
        print(f"NOT AUDITED: pip-audit could not be run or told nothing ({said}); known weaknesses were not looked up")
        return NOT_ASKED
    skipped = [row["name"] for row in found if "skip_reason" in row]
    weak = [(row["name"], row["version"], bug) for row in found for bug in row.get("vulns", ())]
    for name, version, bug in weak:
        mended = ", ".join(bug.get("fix_versions", ())) or "no version yet"
        print(f"{name} {version}: {bug['id']}, mended in {mended}")
    looked = len(found) - len(skipped)
    print(f"{looked} of {len(blocks)} packages were looked up, {len(weak)} weaknesses are known")
    if looked < len(blocks):
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(
            f"NOT AUDITED: {len(blocks) - looked} packages ({names}): this index does not tell of weaknesses, or has them not"
        )
    return WEAK if weak else NOT_ASKED if looked < len(blocks) else 0


def asked(lock: Path, command: list[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """pip-audit's list; None, and why, where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "audit.json"
        options = ("--require-hashes", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-o", str(answer))
        try:
            done = subprocess.run([*command, *options, "-r", str(lock)], capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as e:
            return None, str(e)
        try:
            return json.loads(answer.read_text())["dependencies"], ""
        except (OSError, ValueError, KeyError, TypeError):
            return None, (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


if __name__ == "__main__":
    sys.exit(audit(Path(sys.argv[1]), sys.argv[2:]))
