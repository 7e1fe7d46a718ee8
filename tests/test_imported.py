"""teacher.checkpoint and student.checkpoint: every published layout stands where a trained network would."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pupil import assemble, checkpoint, config, imported, inspection, record, report, session, tracking
from pupil import settings as settings_of
from pupil.data import Prepared, prepare
from pupil.models import build
from pupil.settings import Settings
from pupil.types import UserError
from tests import tiny
from tests.test_published import LAYOUTS, as_published, without_counters

OPTIM = {"epochs": 1, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
PAGE: dict[str, Any] = {"device": "cpu", "teachers": ["resnet14"], "students": ["resnet8"], "optim": OPTIM, "methods": ["kd"]}
PAGE["data"] = {"train_images": 40, "val_images": 10, "test_images": 20, "image_size": 16, "pad": 2}


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.delenv("DVC_STAGE", raising=False)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground") / "data"
    prepare(resolved({}).data, folder)
    return folder


def resolved(over: dict[str, Any]) -> Settings:
    return config.resolve(settings_of.overlay(settings_of.overlay(settings_of.defaults(), PAGE), over))


def importing(data_folder: Path, out: Path, role: str, file: str, **train: Any) -> tuple[Settings, Prepared]:
    over = {role: {"checkpoint": file}, "train": {"role": role, **train}, "prepared": str(data_folder)}
    settings = resolved(over | {"out": str(out / "model"), "record": str(out / "record")})
    return settings, assemble.prepared(settings)


def a_network(name: str, classes: int = 10) -> Any:
    torch.manual_seed(0)
    return build(name, classes).eval()


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_stands_for_a_training(case: str, role: str, data_folder: Path, tmp_path: Path) -> None:
    printed, layout = LAYOUTS[case]
    name = {"teacher": "resnet14", "student": "resnet8"}[role]
    net = a_network(name)
    torch.save(layout(as_published(name, net.state_dict()), name), tmp_path / f"{name}.pth")
    settings, data = importing(data_folder, tmp_path, role, str(tmp_path / "{network}.pth"))
    imported.run(settings, data)

    got, meta = checkpoint.load(tmp_path / "model")
    images = tiny.first_batch().images
    tolerance = 0.05 if case == "half" else 0.0
    with torch.no_grad():
        torch.testing.assert_close(got(images), net(images), rtol=0, atol=tolerance)
    digest = record.sha256(tmp_path / f"{name}.pth")
    assert meta["imported"] == {"layout": printed, "sha256": digest}
    assert (meta["role"], meta["classes"], meta["epoch"]) == (role, data.manifest["classes"], None)
    saved = load_file(tmp_path / "model" / session.PREDICTIONS)
    assert saved.keys() == {"labels", "deployed"}
    facts = record.read(tmp_path / "record")
    assert facts["status"] == "FINISHED"
    assert facts["name"].endswith(", imported")
    assert facts["inputs"]["checkpoint"] == digest
    assert facts["params"]["checkpoint"] == str(tmp_path / f"{name}.pth")
    assert not any(key.startswith("optim") for key in facts["params"])
    assert facts["seeds"].keys() == {"data"}
    accuracy = 100 * (saved["deployed"].argmax(1) == saved["labels"]).double().mean().item()
    assert facts["final"]["test/top1"] == pytest.approx(accuracy)
    assert record.read_metrics(tmp_path / "record") == []
    told = json.loads((tmp_path / "record/artifacts/import.json").read_text())["told"]
    assert f"layout {printed}; {name}, all " in told[0]
    assert any("num_batches_tracked are not in the file" in line for line in told) == case.endswith("0.4")


def test_an_import_leaves_the_same_bytes_twice(data_folder: Path, tmp_path: Path) -> None:
    torch.save(a_network("resnet14").state_dict(), tmp_path / "a.pth")
    for i in (1, 2):
        torch.manual_seed(i)
        imported.run(*importing(data_folder, tmp_path / str(i), "teacher", str(tmp_path / "a.pth")))
    for file in (checkpoint.WEIGHTS, checkpoint.META, session.PREDICTIONS):
        assert (tmp_path / "1/model" / file).read_bytes() == (tmp_path / "2/model" / file).read_bytes()


def test_a_model_folder_and_a_network_from_elsewhere_are_imported(data_folder: Path, tmp_path: Path) -> None:
    torch.save(a_network("resnet14").state_dict(), tmp_path / "a.pth")
    imported.run(*importing(data_folder, tmp_path / "1", "teacher", str(tmp_path / "a.pth")))
    folder = str(tmp_path / "1/model")
    imported.run(*importing(data_folder, tmp_path / "2", "teacher", folder))
    meta = checkpoint.read_meta(tmp_path / "2/model")
    assert meta["imported"] == {"layout": "model folder", "sha256": meta["sha256"]}
    with pytest.raises(UserError, match=r"teacher\.checkpoint: .*model holds a resnet14, but the network asked for is resnet8"):
        imported.run(*importing(data_folder, tmp_path / "3", "teacher", folder, network="resnet8"))


def test_a_network_of_torchvision_is_imported_by_its_own_keys(data_folder: Path, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    name, file = "torchvision/shufflenet_v2_x0_5", tmp_path / "t.pth"
    torch.save(without_counters(theirs.state_dict()), file)
    imported.run(*importing(data_folder, tmp_path / "1", "teacher", str(file), network=name))
    images = tiny.first_batch().images
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.load(tmp_path / "1/model")[0](images), theirs(images), rtol=1e-4, atol=1e-4)
    state = theirs.state_dict()
    del state["fc.bias"]
    torch.save(state | {"more": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"not those of torchvision/shuf\S+: more is left over, fc.bias is missing$"):
        imported.run(*importing(data_folder, tmp_path / "2", "teacher", str(file), network=name))
    assert not (tmp_path / "2").exists()


def test_statistics_that_differ_are_one_line() -> None:
    file = imported.Import(build("resnet8", 10), {}, {}, [], "cifar10")
    seen = {"name": "folder", "classes": ["c"] * 10, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    (line,) = imported.differences(file, seen)
    assert line.startswith(
        "note: it sees mean [0.5, 0.5, 0.5] of the prepared data, [0.491, 0.482, 0.447] published for cifar10;"
    )
    assert imported.differences(file._replace(data=None), seen) == []  # two data sets have ten classes
    (line,) = imported.differences(file._replace(data=None), seen | {"classes": ["c"] * 100})
    assert "published for cifar100" in line
    folder = file._replace(meta=seen | {"image_size": 64})
    assert imported.differences(folder, seen) == ["note: it sees image_size 32 of the prepared data, 64 its model.json says"]
    assert imported.differences(folder._replace(meta=seen), seen) == []


def test_check_reads_the_files_and_sees_that_one_has_changed(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assemble, "HOME", tmp_path)
    torch.save(a_network("resnet14").state_dict(), tmp_path / "a.pth")
    settings, data = importing(data_folder, tmp_path, "teacher", "a.pth")
    settings = dataclasses.replace(settings, record=str(tmp_path / "out/records/teacher/resnet14"))
    imported.run(settings, data)
    inspection.check(settings)
    out = capsys.readouterr().out
    assert "teacher resnet14 is imported, not trained: " in out
    assert "fine: 6 trainings are configured" in out
    torch.save({"state_dict": a_network("resnet14").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"a\.pth has changed since it was imported; run dvc repro --force --single-item train_"
    ):
        inspection.check(settings)


def test_the_table_says_imported_and_counts_one_file_once() -> None:
    costs = dict.fromkeys(report.COSTS, 1.0)
    rows: list[dict[str, Any]] = [
        {"family": family, "baseline": base, "seed": seed, "method": method, "top1": top1, "nll": 1.0, "ece": 1.0, **costs}
        for family, base, method, values in (
            ("resnet8 alone", None, None, (50.0, 50.0, 50.0)),
            ("resnet8 by kd", "resnet8 alone", "kd", (60.0, 61.0, 62.0)),
        )
        for seed, top1 in enumerate(values)
    ]
    for row in rows:
        row["top5"] = 99.0
    assert "imported" not in report.table(report.summarise(rows), {})
    families = report.summarise([row | ({} if row["method"] else {"imported": "abc"}) for row in rows])
    text = report.table(families, {}).splitlines()
    assert text[2].split("|")[1:4] == [" resnet8 alone, imported ", " 1     ", " 50.00        "]
    assert ", imported baseline |" in text[3]
    assert text[-1].startswith("imported baseline: not trained here")
    assert report.metrics_tree(families)["resnet8 alone"]["imported"] == 1


def test_an_imported_student_lends_its_classifier_to_sh_kd(data_folder: Path, tmp_path: Path) -> None:
    net = a_network("resnet8")
    torch.save({"model": as_published("resnet8", net.state_dict()), "best_acc": 1.0}, tmp_path / "s.pth")
    imported.run(*importing(data_folder, tmp_path, "student", str(tmp_path / "s.pth")))
    borrowed = {"role": "shkd", "network": "resnet14", "head_of": str(tmp_path / "model")}
    job = assemble.single(
        resolved({"train": borrowed, "prepared": str(data_folder)}), assemble.prepared(resolved({"prepared": str(data_folder)}))
    )
    assert torch.equal(job.method.student.head.weight, net.head.weight)  # type: ignore[arg-type, union-attr]
