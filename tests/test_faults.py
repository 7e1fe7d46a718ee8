"""What goes wrong around a training: one line that says what to do, nothing lost, nothing wrong passed on."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import arrays, assemble, checkpoint, config, figures, points, record, session, tracking
from pupil import settings as settings_of
from pupil.data import load, prepare
from pupil.data.dali import Dali, installed
from pupil.data.workers import Job, Made
from pupil.methods.kd import KD
from pupil.places import PREDICTIONS
from pupil.resume import Keeper, Stopped
from pupil.room import Need, advice
from pupil.sealed import read_sealed, write_sealed
from pupil.settings import Settings
from pupil.types import UserError
from tests.inprocess import at_home

FILES = (checkpoint.WEIGHTS, checkpoint.META, PREDICTIONS)
OPTIM = {"epochs": 3, "batch_size": 10, "lr": 0.02, "schedule": "cosine"}
PAGE: dict[str, Any] = {
    "teachers": ["resnet8"],
    "students": ["resnet8"],
    "seeds": [0],
    "device": "cpu",
    "optim": OPTIM,
    "teacher": {"optim": OPTIM},
    "data": {"train_images": 40, "val_images": 10, "test_images": 20, "image_size": 16, "pad": 2},
    "resume_every": 0,
    "prepared": "out/data",
    "out": "out/model",
    "record": "out/record",
    "distill": {"method": "kd", "checkpoint": "out/teacher"},
}


def settings(**more: Any) -> Settings:
    return config.resolve(settings_of.overlay(settings_of.overlay(settings_of.defaults(), PAGE), more))


def full(*given: object, **more: object) -> None:
    raise OSError(28, "No space left on device", "out/somewhere")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared digits and a teacher's folder."""
    root = tmp_path_factory.mktemp("ground")
    prepare(settings().data, root / "out/data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        mine = settings(train={"role": "teacher"})
        data = assemble.prepared(mine)
        job = assemble.single(mine, data)
    meta = {**job.meta, **{key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(root / "out/teacher", job.method.student.state_dict(), meta)
    return root


class Lab(NamedTuple):
    """A folder that stands for the checkout."""

    root: Path

    def train(self, **more: Any) -> dict[str, Any]:
        """A cell, as the stage does; what it leaves that must be equal to the bit."""
        now = settings(**more)
        data = assemble.prepared(now)
        session.run([[assemble.distillation(now, data)]], data, now)
        return self.left()

    def left(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: (self.root / "out/model" / name).read_bytes() for name in FILES}
        lines = record.read_metrics(self.root / "out/record")
        found["lines"] = [(e["step"], {k: v for k, v in e["values"].items() if not timed(k)}) for e in lines]
        facts = record.read(self.root / "out/record")
        assert not list((self.root / ".work/resume").glob("*")), "nothing is left to go on from"
        del facts["params"]["loader"]  # by which other tests differ
        return found | {key: facts[key] for key in ("final", "outputs", "inputs", "params", "status")}

    @property
    def point(self) -> Path:
        (found,) = (self.root / ".work/resume").glob("*/point.safetensors")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        return record.read(self.root / "out/record")


def timed(name: str) -> bool:
    return name == "images_per_second" or name.startswith("system/")


def lab_at(ground: Path, root: Path, patch: pytest.MonkeyPatch) -> Lab:
    shutil.copytree(ground, root, dirs_exist_ok=True)
    at_home(root, patch)
    patch.setattr(tracking, "find_spec", lambda name: None)
    return Lab(root)


@pytest.fixture
def lab(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return lab_at(ground, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed training leaves."""
    return undisturbed(ground, tmp_path_factory.mktemp("whole"))


def undisturbed(ground: Path, root: Path, **more: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        return lab_at(ground, root, patch).train(**more)


@pytest.fixture(scope="module")
def by_loader(ground: Path, whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same of each loader: their batches are laid out otherwise in memory, and sums are rounded otherwise."""
    others = {
        name: undisturbed(ground, tmp_path_factory.mktemp(name), loader=name)
        for name in ("workers", "dali")
        if name == "workers" or installed()
    }
    return {"resident": whole, "streamed": whole, **others}


def at_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Before that step, counted from 1 over all epochs of a training by kd."""
    count, forward = [0], KD.forward

    def counted(self: KD, *given: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            act()
        return forward(self, *given)

    patch.setattr(KD, "forward", counted)


def in_epoch(patch: pytest.MonkeyPatch, epoch: int, act: Callable[[], object]) -> None:
    """Before that epoch of four steps has its second step."""
    at_step(patch, 4 * epoch - 2, act)


# --- disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [2, 3, 9])
def test_a_disk_that_is_full_for_a_point_costs_that_point_alone(
    call: int, lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = points.write, [0]

    def sometimes(path: Path, tree: Any) -> None:
        calls[0] += 1
        (full if calls[0] == call else write)(path, tree)

    monkeypatch.setattr(points, "write", sometimes)
    assert lab.train() == whole
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert "cannot be written: No space left on device; the point before it is kept, and training goes on" in said


def test_who_is_stopped_on_a_full_disk_goes_on_from_the_point_before(
    lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stop() -> None:
            patch.setattr(points, "write", full)
            os.kill(os.getpid(), signal.SIGTERM)

        at_step(patch, 6, stop)
        with pytest.raises(Stopped, match="stopped by SIGTERM, the point before it is kept"):
            lab.train()
    assert points.read(lab.point)["states"][0]["place"] == [0, 2, 2, 1]
    assert lab.facts["status"] == "KILLED"
    assert lab.train() == whole


PLACES = {
    "weights": (arrays, "save_file", 1),
    "predictions": (arrays, "save_file", 2),
    "model.json": (checkpoint, "write_sealed", 1),
    "metrics": (record.Record, "log", 2),
    "figures": (figures, "draw_all", 1),
    "record, first": (record.Record, "write", 1),
    "record, last": (record.Record, "write", 2),
    "claim": (Keeper, "claimed", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_for_results_ends_it_and_the_same_command_goes_on(
    place: str, lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, call = PLACES[place]
    real, calls = getattr(where, name), [0]

    def sometimes(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        return (full if calls[0] == call else real)(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, sometimes)
        with pytest.raises(UserError, match=r"No space left on device; mend that and run the same command: it goes on"):
            lab.train()
    left = lab.facts["uid"] if (lab.root / "out/record/record.json").exists() else None
    assert lab.train() == whole
    assert left in (None, lab.facts["uid"])


def test_what_safetensors_says_of_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    (tmp_path / "a.new").mkdir()
    with pytest.raises(OSError):
        arrays.save_arrays(tmp_path / "a", {"x": torch.ones(3)})
    assert (tmp_path / "a").read_bytes() == b"before"


# --- files that are not what was written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_point_is_set_aside_and_training_begins_anew(
    harm: str, lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="everything is saved"):
            lab.train()
    raw = lab.point.read_bytes()
    middle = len(raw) // 2
    lab.point.write_bytes(raw[:middle] if harm == "cut" else raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :])
    assert lab.train() == whole
    assert "is damaged" in (said := capsys.readouterr().err)
    assert "set aside as damaged.safetensors, and training begins anew" in said


def refused_or_the_same(path: Path, read: Callable[[], Any], same: Callable[[Any], bool], seed: int) -> int:
    """Bits are flipped one at a time; how many of them were refused in one line that says what to do."""
    raw, dice, refused = path.read_bytes(), random.Random(seed), 0
    for at in dice.sample(range(len(raw)), 40):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :])
        said = ""
        try:
            assert same(read()), f"a bit of byte {at} of {path.name} passed unseen"
        except UserError as e:
            said = str(e)
        if said:
            refused += 1
            assert "dvc repro" in said
            assert str(path.parent) in said
    for at in (0, 1, len(raw) // 2, len(raw) - 2):
        path.write_bytes(raw[:at])
        with pytest.raises(UserError, match="dvc repro"):
            read()
    path.write_bytes(raw)
    return refused


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.META])
def test_no_flipped_bit_of_a_trained_network_passes(name: str, lab: Lab) -> None:
    folder = lab.root / "out/teacher"
    net, meta = checkpoint.load(folder)

    def same(found: tuple[Any, Any]) -> bool:
        return found[1] == meta and all(torch.equal(v, net.state_dict()[k]) for k, v in found[0].state_dict().items())

    assert refused_or_the_same(folder / name, lambda: checkpoint.load(folder), same, 0) > 20


@pytest.mark.parametrize("name", ["manifest.json", "train.safetensors", "test.safetensors"])
def test_no_flipped_bit_of_prepared_data_passes(name: str, lab: Lab) -> None:
    folder = lab.root / "out/data"
    whole = load(folder)

    def same(found: Any) -> bool:
        return found.manifest == whole.manifest and all(torch.equal(found.splits[k][1], v[1]) for k, v in whole.splits.items())

    assert refused_or_the_same(folder / name, lambda: load(folder), same, 1) > 20


def test_sealed_json_says_what_was_written(tmp_path: Path) -> None:
    facts = {"b": [1, 2.5, None], "a": {"x": float("inf")}}
    write_sealed(tmp_path / "f", facts)
    assert read_sealed(tmp_path / "f") == facts
    (tmp_path / "f").write_text((tmp_path / "f").read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="checksum"):
        read_sealed(tmp_path / "f")


# --- what changes while a training runs -----------------------------------------------------------------------------------

LOADERS = ["resident", "streamed", "workers", pytest.param("dali", marks=pytest.mark.skipif(not installed(), reason="no DALI"))]


@pytest.mark.parametrize("how", ["in place", "renamed"])
@pytest.mark.parametrize("loader", LOADERS)
def test_data_that_change_under_a_training_are_refused(
    loader: str, how: str, lab: Lab, by_loader: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lab.root / "out/data/train.safetensors"
    raw = path.read_bytes()

    def change() -> None:
        other = raw[:-4000] + bytes(4000)
        if how == "in place":
            with open(path, "r+b") as file:
                file.write(other)
        else:
            path.with_suffix(".new").write_bytes(other)
            path.with_suffix(".new").replace(path)

    with monkeypatch.context() as patch:
        in_epoch(patch, 2, change)
        with pytest.raises(UserError, match=r"train\.safetensors has changed or gone while this was training; bring it back"):
            lab.train(loader=loader)
    assert points.read(lab.point)["states"][0]["place"][3] == 1, "no step on other data is kept"
    with pytest.raises(UserError, match=r"train\.safetensors is damaged.*dvc repro prepare"):
        lab.train(loader=loader)
    path.write_bytes(raw)
    assert lab.train(loader=loader) == by_loader[loader]


def test_data_that_vanish_under_a_training_are_missed(lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        in_epoch(patch, 2, lambda: (lab.root / "out/data").rename(lab.root / "elsewhere"))
        with pytest.raises(UserError, match="has changed or gone while this was training"):
            lab.train(loader="streamed")
    (lab.root / "elsewhere").rename(lab.root / "out/data")
    assert lab.train(loader="streamed") == whole


def test_data_that_are_only_touched_are_the_same_data(lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = lab.root / "out/data/train.safetensors"

    def touch() -> None:  # as `dvc checkout` may
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    in_epoch(monkeypatch, 2, touch)
    assert lab.train(loader="streamed") == whole


def test_a_record_that_is_removed_under_a_training_comes_back(
    lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_epoch(patch, 2, lambda: shutil.rmtree(lab.root / "out/record"))
        with pytest.raises(
            UserError, match=r"out/record/metrics\.jsonl: No such file or directory; mend that and run the same"
        ):
            lab.train()
    assert lab.train() == whole


def test_a_teacher_that_is_removed_after_the_start_has_taught_already(
    lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_epoch(monkeypatch, 2, lambda: shutil.rmtree(lab.root / "out/teacher"))
    assert lab.train() == whole


def test_a_teacher_that_is_removed_at_the_start_is_missed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = Keeper.claimed

    def remove(*given: Any) -> None:
        shutil.rmtree(lab.root / "out/teacher")
        claimed(*given)

    monkeypatch.setattr(Keeper, "claimed", remove)
    with pytest.raises(UserError, match=r"out/teacher/model\.safetensors: No such file or directory; mend that"):
        lab.train()


# --- helpers that die -----------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_ends_it_and_the_same_command_goes_on(
    lab: Lab, by_loader: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        child = multiprocessing.active_children()[0]
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()

    make = Made.__getitem__

    def slowly(self: Made, job: Job) -> tuple[Tensor, ...]:  # else it may have made all its batches already
        time.sleep(1 if job[0] == 2 else 0)
        return make(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(Made, "__getitem__", slowly)
        in_epoch(patch, 2, kill)
        with pytest.raises(UserError, match=r"a process that makes batches has died \(.*\), often for want of memory; run the"):
            lab.train(loader="workers")
    assert points.read(lab.point)["states"][0]["place"][2] == 2
    assert lab.train(loader="workers") == by_loader["workers"]


def test_a_signal_to_the_workers_as_well_is_a_stop(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        child = multiprocessing.active_children()[0]
        child.terminate()
        child.join()

    in_epoch(monkeypatch, 2, kill)
    with pytest.raises(Stopped, match="stopped by SIGTERM, "):
        lab.train(loader="workers")
    assert points.read(lab.point)["states"][0]["place"][2] == 2


def test_an_interrupt_that_reaches_a_worker_alone_is_nothing(
    lab: Lab, by_loader: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A terminal sends it to all; the training hears it, and its workers end with it."""

    def interrupt() -> None:
        child = multiprocessing.active_children()[0]
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.5)

    in_epoch(monkeypatch, 2, interrupt)
    assert lab.train(loader="workers") == by_loader["workers"]
    assert "stopping" not in capfd.readouterr().err


@pytest.mark.skipif(not installed(), reason="no DALI")
def test_a_fault_of_dali_ends_it_and_the_same_command_goes_on(
    lab: Lab, by_loader: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = Dali.make, [0]

    def sometimes(self: Dali, number: int, ids: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:
            given = self.inputs(number, ids)
            given["starts"] = [part.reshape(2, 1) for part in given["starts"]]  # a shape that the pipeline refuses
            monkeypatch.setattr(Dali, "inputs", lambda *more: given)
        return make(self, number, ids)

    with monkeypatch.context() as patch:
        patch.setattr(Dali, "make", sometimes)
        inputs = Dali.inputs
        with pytest.raises(UserError, match=r"DALI failed in epoch 2 \(.+\); run the same command"):
            lab.train(loader="dali")
    monkeypatch.setattr(Dali, "inputs", inputs)
    assert lab.train(loader="dali") == by_loader["dali"]


# --- memory ---------------------------------------------------------------------------------------------------------------

OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT, ids=lambda e: type(e).__name__)
def test_out_of_memory_says_what_would_fit(error: Exception, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    at_step(monkeypatch, 6, fail)
    with pytest.raises(UserError) as caught:
        lab.train()
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("out of memory on cpu at optim.batch_size=10: it needs about ")
    assert "use optim.batch_size=5 " in said
    assert lab.facts["status"] == "FAILED"
    assert points.read(lab.point)["states"][0]["place"] == [0, 2, 2, 1]


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (10 * 2**20, "not even two images at once fit"),
        (100 * 2**20 + 10 * 2**20 * 10, "enough for about 8 images at once; use b=8"),
        (10**12, "use b=32"),
    ],
)
def test_advice_fits_into_the_memory_that_is_free(free: int, said: str) -> None:
    assert said in advice([Need(60 * 2**20, 6 * 2**20), Need(40 * 2**20, 4 * 2**20)], free, 64, "b")


def test_other_errors_stay_what_they_are(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a mistake in the code")

    at_step(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        lab.train()
    assert lab.facts["status"] == "FAILED"


# --- numbers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training_within_the_step(
    value: float, step: int, precision: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, forward, seen = [0], KD.forward, []

    def spoiled(self: KD, batch: Any, *given: Any) -> Any:
        count[0] += 1
        terms = forward(self, batch, *given)
        if count[0] == step:
            seen[:] = batch.ids.tolist()
            name = next(iter(terms))
            terms[name] = terms[name]._replace(raw=terms[name].raw * value)
        return terms

    monkeypatch.setattr(KD, "forward", spoiled)
    epoch, at = divmod(step - 1, 4)
    with pytest.raises(UserError) as caught:
        lab.train(precision=precision)
    said = str(caught.value)
    assert f" became {value} in step {at + 1} of epoch {epoch + 1} of phase 'distil'" in said
    assert count[0] == step, "no step after it"
    kept = read_sealed(lab.root / "out/record/artifacts/not_finite.json")
    assert (kept["epoch"], kept["step"], kept["training_images"]) == (epoch + 1, at + 1, seen)
    assert kept["error"] in said
    assert lab.facts["status"] == "FAILED"
    assert str(lab.point) in said
    (state,) = points.read(lab.point)["states"]
    assert state["place"] == [0, epoch + 1, epoch + 1, at]
    assert all(t.isfinite().all() for t in state["tensors"].values())


def test_weights_that_are_no_numbers_are_not_taken_for_a_good_state(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = torch.optim.SGD.step, [0]

    def spoiled(self: torch.optim.SGD, *given: Any) -> Any:
        count[0] += 1
        found = step(self, *given)
        if count[0] == 6:
            self.param_groups[0]["params"][0].data[0] = float("inf")
        return found

    monkeypatch.setattr(torch.optim.SGD, "step", spoiled)
    with pytest.raises(
        UserError, match=r"'student\..*' became infinite or no number in or before step 2 of epoch 2 of phase 'd"
    ):
        lab.train()
    (state,) = points.read(lab.point)["states"]
    assert state["place"] == [0, 2, 2, 1]
    assert all(t.isfinite().all() for t in state["tensors"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*")
def test_mlflow_shows_the_failure_and_its_images(lab: Lab) -> None:
    with pytest.raises(UserError):
        lab.train(optim={"lr": 1e30})
    store = tracking.connect(lab.root, "pupil")
    mirror = tracking.Mirror(lab.root / "out/record", store)
    assert mirror.push()
    assert store.client.get_run(str(mirror.run)).info.status == "FAILED"
    assert "not_finite.json" in {file.path for file in store.client.list_artifacts(str(mirror.run))}


# --- being asked to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_results_are_written_is_heard_at_once(
    number: signal.Signals, lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def hit(*given: object) -> None:
            os.kill(os.getpid(), number)
            raise AssertionError("it went on")

        patch.setattr(figures, "draw_all", hit)
        with pytest.raises(Stopped, match=f"stopped by {number.name}, everything is saved: the same command goes on"):
            lab.train()
    assert (lab.root / "out/model" / checkpoint.WEIGHTS).exists()
    assert lab.train() == whole


def test_a_kill_between_two_files_of_what_is_left_leaves_it_ours(
    lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is there of an attempt, in whatever order it was removed: nothing of it is taken for a stranger's."""
    for when in (shutil.rmtree, Path.unlink):
        for number in range(1, 5 if when is Path.unlink else 2):
            with monkeypatch.context() as patch:
                at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
                with pytest.raises(Stopped):
                    lab.train()
            calls = [0]

            def hit(*given: Any, when: Any = when, calls: list[int] = calls, number: int = number, **more: Any) -> None:
                calls[0] += 1
                if calls[0] == number:
                    raise KeyboardInterrupt
                when(*given, **more)

            with monkeypatch.context() as patch:
                patch.setattr(shutil if when is shutil.rmtree else Path, when.__name__, hit)
                at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
                with pytest.raises((KeyboardInterrupt, Stopped)):
                    lab.train()
    assert lab.train() == whole


def test_replacing_the_settings_never_goes_on_from_another_training(
    lab: Lab, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            lab.train()
    kept = lab.point.read_bytes()
    others = {"lr": {"optim": {"lr": 0.01}}, "seed": {"distill": {"seed": 1}}, "T": {"hp": {"kd": {"T": 2.0}}}}
    for name, change in others.items():
        with monkeypatch.context() as patch:
            seen: list[Any] = []
            patch.setattr(session, "train_group", lambda *given, seen=seen: seen.append(given[-1]))
            now = settings(**change, out=f"out/{name}", record=f"out/{name}_record")
            data = assemble.prepared(now)
            session.run([[assemble.distillation(now, data)]], data, now)
            assert seen == [None], name
    assert lab.point.read_bytes() == kept
    assert lab.train() == whole
    assert "goes on from epoch 2" in capsys.readouterr().out
