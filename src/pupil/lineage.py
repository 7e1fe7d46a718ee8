"""`python -m pupil why RUN`: from a metric back to data, code, configuration, environment and teacher, and how to repeat it."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pupil import record
from pupil.again import Again, again, configuration, differences, model_of, params_at, weights_in
from pupil.assemble import find as find_folder
from pupil.checkpoint import META, read_meta
from pupil.config import HOME
from pupil.data.prepare import TEACHER
from pupil.feeds import pick_device
from pupil.machine import describe
from pupil.trace import Found, Records, find, shown
from pupil.types import UserError

SECTIONS = {  # what a stage reads of the settings
    "prepare": ("data",),
    "train_teacher": ("data", "teacher", "protocol"),
    "retrain_teacher": ("data", "teacher", "protocol"),
    "train_student": ("data", "optim", "student", "protocol"),
    "distill": ("data", "optim", "protocol"),
    "evaluate": ("teachers", "students", "methods", "seeds", "shkd", "recipe"),
}
SPEED = ("device", "precision", "layout", "compile")


def why(text: str, command_only: bool = False) -> Iterator[str]:
    """Lines for people; with `command_only`, the command that repeats the run."""
    records = Records()
    found = find(text, records)
    if command_only:
        yield again(found, records).command
        return
    told: set[str] = set()
    waiting = [found]
    while waiting:
        here = waiting.pop(0)
        if here.facts["uid"] in told:
            continue
        if told:
            yield ""
        told.add(here.facts["uid"])
        yield from about(here, records)
        waiting += parents(here, records)


def parents(found: Found, records: Records) -> list[Found]:
    """The runs that this one started from."""
    facts = found.facts
    wanted = [(facts["teacher"]["sha256"], facts["teacher"].get("uid"))] if facts.get("teacher") else []
    wanted += [(sha256, HOME / folder) for folder, sha256 in facts["inputs"].items()] if facts["stage"] == "evaluate" else []
    made = [records.of_weights(*each) for each in wanted]
    if facts.get("data") and facts["stage"] != "prepare":
        made.append(records.of_data(facts["data"]["digest"]))
    return [parent for parent in made if parent is not None]


def about(found: Found, records: Records) -> Iterator[str]:
    """One run."""
    facts, repeat = found.facts, again(found, records)
    yield facts["name"]
    lines = [("note", found.note)] if found.note else []
    lines += [("record", told(found)), *outcome(found), *data(found, records), *ancestry(found, records)]
    lines += [*code(facts, repeat), *settings(found), *environment(facts), *repetition(facts, repeat)]
    for label, text in lines:
        yield f"  {label:<12} {text}"


def repetition(facts: Mapping[str, Any], repeat: Again) -> Iterator[tuple[str, str]]:
    yield "again", repeat.command
    if "dvc.stage" in (facts.get("tags") or {}):
        yield "", "(DVC restores what it still has; with --force it trains it anew)"


def told(found: Found) -> str:
    facts = found.facts
    ended = f" to {clock(facts['ended'])}" if "ended" in facts else ""
    return f"{shown(found.folder)}, uid {facts['uid']}, {facts['status']}, {clock(facts['started'])}{ended} UTC"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def outcome(found: Found) -> Iterator[tuple[str, str]]:
    """What was measured, and the weights it was measured of."""
    final = found.facts.get("final") or {}
    if final:
        yield "metrics", ", ".join(f"{name} {value:.6g}" for name, value in final.items())
    if found.weights is not None and found.model is not None:
        yield "model", f"{shown(found.model)}, sha256 {found.weights}"
        if model_of(found) is None:
            now = "holds other weights now" if weights_in(found.model) else "is not there any more"
            yield "WARNING", f"{shown(found.model)} {now}"


def data(found: Found, records: Records) -> Iterator[tuple[str, str]]:
    facts = found.facts
    if not facts.get("data"):
        return
    given, seed = facts["data"], facts["seeds"].get("data")
    made = records.of_data(given["digest"])
    origin = f"; prepared by {shown(made.folder)}, below" if made and facts["stage"] != "prepare" else ""
    yield "data", f"{given['name']} from {given['source']}, seed {seed}, digest {given['digest']}{origin}"
    folder = find_folder((configuration(found) or {}).get("prepared") or "out/data")
    held = [digest_of(part) for part in (folder, folder / TEACHER)]
    if given["digest"] not in held:
        there = f"holds other data, digest {held[0]}" if held[0] else "holds no data"
        yield "WARNING", f"{shown(folder)} {there}: prepare those of this run first"


def digest_of(folder: Path) -> str | None:
    """What identifies prepared data."""
    try:
        return json.loads((folder / "manifest.json").read_bytes())["digest"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def ancestry(found: Found, records: Records) -> Iterator[tuple[str, str]]:
    """The teacher, the lender of a head, the file an import was made of, the networks of a comparison."""
    facts = found.facts
    inputs = facts.get("inputs") or {}
    if facts["stage"] == "evaluate":
        for folder, sha256 in inputs.items():
            source = records.of_weights(sha256, HOME / folder)
            yield "network", f"{folder}, sha256 {sha256}: {shown(source.folder) + ', below' if source else 'no record'}"
    if "checkpoint" in inputs:
        yield "file", f"{facts['params'].get('checkpoint')}, sha256 {inputs['checkpoint']}: imported, not trained here"
    if not (teacher := facts.get("teacher")):
        return
    role = "teacher" if facts["stage"] == "distill" else "head of"
    source = records.of_weights(teacher["sha256"], teacher.get("uid"))
    text = f"{teacher['network']}, sha256 {teacher['sha256']}"
    if source is not None:
        yield role, f"{text}: {shown(source.folder)}, below"
        return
    yield role, f"{text}: no record below out/records or runs{imported(found, teacher['sha256'])}"


def imported(found: Found, sha256: str) -> str:
    """What the model folder of a teacher without a record says of its origin."""
    given = ((configuration(found) or {}).get("distill") or {}).get("checkpoint")
    folder = find_folder(given or "")
    if not given or not (folder / META).exists() or weights_in(folder) != sha256:
        return ""
    origin = read_meta(folder).get("imported")
    return f"; {shown(folder)} was imported from a file of sha256 {origin['sha256']}" if origin else f"; it is {shown(folder)}"


def code(facts: Mapping[str, Any], repeat: Again) -> Iterator[tuple[str, str]]:
    env = facts.get("environment") or {}
    commit = env.get("git_commit")
    here = {True: "; the code here is the same", False: "; the code here is another", None: ""}[repeat.same_code]
    changed = env.get("git_changed") or []
    dirty = f", with uncommitted changes in {', '.join(changed)}" if changed else ", with uncommitted changes"
    yield "code", f"commit {commit or 'unknown'}{dirty if env.get('git_dirty') else ''}{here}"
    if env.get("command"):
        yield "typed", " ".join(env["command"])
    touched = [name for name in changed if name.startswith(("src/", "stages/", "networks/")) or name == "dvc.yaml"]
    if repeat.same_code:
        return
    if commit is not None and not repeat.known:
        yield "WARNING", f"commit {commit} is not in this repository; fetch it first"
    if touched:
        yield "WARNING", f"the commit alone is not the code of this run: {', '.join(touched)} had changes that no commit holds"


def settings(found: Found) -> Iterator[tuple[str, str]]:
    """The configuration, and what of it that this run reads differs from params.yaml here."""
    then = configuration(found)
    if then is None:
        return
    yield "config", shown(found.folder / "artifacts" / "config.json")
    try:
        rows = differences(then, params_at(None))
    except UserError as e:
        yield "WARNING", f"params.yaml here cannot be compared: {e}"
        return
    method = found.facts["params"].get("method")
    read = (*SECTIONS.get(found.facts["stage"], ()), *SPEED, *([f"hp.{method}"] if method else []))
    for key, value, now in rows:
        if any(key == name or key.startswith(f"{name}.") for name in read):
            yield "differs", f"{key} was {value!r}, params.yaml here says {now!r}"


def environment(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    then = facts.get("environment") or {}
    packages = ", ".join(f"{name} {version}" for name, version in (then.get("packages") or {}).items())
    yield "environment", f"python {then.get('python')}, {packages}"
    yield "machine", f"{then.get('device')}, {then.get('processor')}, {then.get('cores')} cores, {then.get('platform')}"
    now = record.environment(describe(pick_device("auto")))
    for key in ("python", "device", "processor", "threads"):
        if key in then and str(then[key]).split(" processes, ")[-1] != str(now.get(key)):
            yield "WARNING", f"{key}: {then[key]} then, {now.get(key)} here"
    for name in dict.fromkeys([*(then.get("packages") or {}), *now["packages"]]):
        a, b = (env.get("packages", {}).get(name, "none") for env in (then, now))
        if a != b:
            yield "WARNING", f"{name}: {a} then, {b} here"
