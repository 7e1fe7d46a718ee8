"""Run records with anything in them: read right, or refused in one line that names the file and what to do."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pupil import record, tracking
from pupil.record import Record, read, read_metrics
from tests.test_fuzz import answer, bent, few, many, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
FACTS: dict[str, Any] = {"stage": "train", "name": "a job", "params": {"optim.lr": 0.1}, "inputs": {}, "group": None}
READ = {
    "uid",
    "status",
    "stage",
    "name",
    "params",
    "started",
    "ended",
    "final",
    "group",
    "teacher",
    "data",
    "model",
    "environment",
}


def written(folder: Path, uid: str = "", **more: Any) -> Path:
    run = Record(folder, {**FACTS, **({"uid": uid} if uid else {}), **more})
    for step in (1, 2):
        run.log({"val/top1": 10.0 * step, "loss": float("nan")}, step)
    run.finish({"test/top1": 55.5}, {"model.safetensors": "ff"})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sound"))


@many
@given(data=st.data())
def test_a_bent_record_is_refused_or_the_same(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path, read(sound)
    (folder / "record.json").write_bytes(bent(data, (sound / "record.json").read_bytes()))
    found = answer(lambda: read(folder))
    assert found is None or found == whole


@many
@given(data=st.data())
def test_bent_metrics_are_refused_or_lines_of_metrics(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(bent(data, (sound / "metrics.jsonl").read_bytes()))
    for line in answer(lambda: read_metrics(tmp_path)) or []:
        assert type(line["step"]) is int
        assert isinstance(line["values"], dict)


@few
@given(raw=st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()) | st.just(b"[" * 100_000))
def test_anything_as_a_record_is_refused(raw: bytes, tmp_path: Path) -> None:
    for name, reader in (("record.json", read), ("metrics.jsonl", read_metrics)):
        (tmp_path / name).write_bytes(raw + b"\n")
        assert not answer(lambda reader=reader: reader(tmp_path))


def test_the_line_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    for name, reader in (("record.json", read), ("metrics.jsonl", read_metrics)):
        folder = written(tmp_path / name)
        (folder / name).write_text("{\n")
        with pytest.raises(ValueError, match=rf"{folder / name} is damaged: .*; delete {folder} and run dvc repro"):
            reader(folder)


def test_sync_passes_strange_records_over_in_one_line_each_and_takes_the_others(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every key of record.json with values of every kind, as a stranger may have written them, without a checksum."""
    odd: list[Any] = [None, 3, -1.5, float("nan"), "x\ny", [], [1], {}, {"a": {"b": [None]}}, True, "x" * 9000, 10**30]
    for i, key in enumerate(sorted(READ)):
        for j, value in enumerate(odd):
            folder = written(home / f"out/{key}-{j}", uid=f"{i:02}{j:02}".rjust(32, "0"))
            facts = {**json.loads((folder / "record.json").read_text()), key: value}
            facts.pop("checksum", None)
            (folder / "record.json").write_text(json.dumps(facts))
    written(home / "out/sound", uid="f" * 32)
    start = time.monotonic()
    created, _, _ = tracking.sync([home / "out"], home, "pupil")
    assert created >= 1
    err = capfd.readouterr().err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert all(line.startswith("sync: ") for line in lines), lines
    folders = {line.split(" skipped: ")[0].split(": the store ")[0] for line in lines}
    assert len(lines) == len(folders), "one line each"
    assert str(home / "out/sound") not in err
    assert time.monotonic() - start < 300
    known = {uid for uid in (answer(lambda f=f: read(f)["uid"]) for f in record.find([home / "out"])) if uid}
    assert "f" * 32 in known
