"""The run record: plain files, whole at any moment."""

import getpass
import json
import math
import os
import platform
import sys
from pathlib import Path

import pytest

from pupil import record
from pupil.record import Record, environment, find, flatten, read, read_metrics, sha256

FACTS = {"stage": "train", "name": "a job", "params": {"optim.lr": 0.1}, "inputs": {}, "group": None}


def test_a_finished_record_holds_what_was_said(tmp_path: Path) -> None:
    changes: list[str] = []
    r = Record(tmp_path / "r", FACTS, lambda: changes.append(read(tmp_path / "r")["status"]))
    r.log({"val/top1": 50.0, "loss": 1.0}, 1)
    r.log({"val/top1": 60.0, "loss": math.nan}, 2)
    r.attach("config.json", {"optim": {"lr": 0.1}})
    r.finish({"test/top1": 55.5}, {"model.safetensors": "ff"})
    assert changes == ["RUNNING", "RUNNING", "RUNNING", "FINISHED"]
    facts = read(tmp_path / "r")
    assert facts.items() >= {**FACTS, "final": {"test/top1": 55.5}, "outputs": {"model.safetensors": "ff"}}.items()
    assert facts["started"] <= facts["ended"]
    lines = read_metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["values"] == {"val/top1": 50.0, "loss": 1.0}
    assert math.isnan(lines[1]["values"]["loss"])
    assert json.loads((tmp_path / "r/artifacts/config.json").read_text()) == {"optim": {"lr": 0.1}}
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["artifacts", "metrics.jsonl", "record.json"]


def test_two_records_have_names_of_their_own(tmp_path: Path) -> None:
    assert Record(tmp_path / "a", FACTS).facts["uid"] != Record(tmp_path / "b", FACTS).facts["uid"]


def test_a_line_that_is_still_written_is_left_out(tmp_path: Path) -> None:
    r = Record(tmp_path, FACTS)
    r.log({"loss": 1.0}, 1)
    r.log({"loss": 2.0}, 2)
    whole = (tmp_path / "metrics.jsonl").read_text()
    for end in range(len(whole.splitlines()[0]) + 1, len(whole)):
        (tmp_path / "metrics.jsonl").write_text(whole[:end])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    (tmp_path / "metrics.jsonl").write_text(whole)
    assert [line["step"] for line in read_metrics(tmp_path, skip=1)] == [2]


def test_a_record_without_epochs_has_no_metrics(tmp_path: Path) -> None:
    Record(tmp_path, FACTS)
    assert read_metrics(tmp_path) == []


def test_the_record_is_replaced_and_never_half_written(tmp_path: Path) -> None:
    r = Record(tmp_path, FACTS)
    before = (tmp_path / "record.json").open()
    r.finish({"test/top1": 1.0}, {})
    with before:
        assert json.load(before)["status"] == "RUNNING", "whoever was reading reads on in the old file"
    assert not (tmp_path / "record.json.new").exists()


def test_a_value_that_cannot_be_written_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    r = Record(tmp_path, FACTS)
    with pytest.raises(TypeError):
        r.finish({"test/top1": object()}, {})  # type: ignore[dict-item]
    assert read(tmp_path)["status"] == "RUNNING"


def test_records_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("b", "a/x/y"):
        Record(tmp_path / "out" / name, FACTS)
    (tmp_path / "out/c").mkdir()
    assert find([tmp_path / "out", tmp_path / "nowhere"]) == [tmp_path / "out/a/x/y", tmp_path / "out/b"]


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_environment_names_versions_and_no_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    monkeypatch.setenv("PUPIL_TEST", "another-secret-value")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "home" / "stages" / "train.py"), "optim.lr=0.1"])
    found = environment("cpu")
    text = json.dumps(found)
    assert found["python"] == platform.python_version()
    assert {"torch", "safetensors", "numpy"} <= found["packages"].keys()
    assert found["command"] == ["train.py", "optim.lr=0.1"]
    assert isinstance(found["git_dirty"], bool)
    assert "secret" not in text
    user, host = getpass.getuser(), platform.node()
    assert user not in found
    assert all(word not in text.split('"') for word in (user, host)), "neither is a value"
    assert not [name for name, value in os.environ.items() if len(value) > 16 and value in text]
    assert str(Path.home()) not in text


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.git("rev-parse", "HEAD") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git("rev-parse", "HEAD") is None
