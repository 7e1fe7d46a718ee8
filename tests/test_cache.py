"""The cache of a teacher's answers holds what the teacher says, rounded once, and nothing that belongs to something else."""

import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pupil import cache as caches
from pupil import record
from pupil.cache import Answer, Cache, Kept, Size, answering, facts
from pupil.data.augment import Augment
from pupil.data.batches import Batches
from pupil.data.resident import Resident
from pupil.fit import fit, teacher_features
from pupil.kept import ABSENT, NotKept, refuse_readers
from pupil.methods import METHODS
from pupil.net import Net
from pupil.optim import Optim
from pupil.speed import Speed, quick
from pupil.training import Training
from pupil.types import Batch, Features, UserError
from tests import tiny
from tests.test_distributed import stage
from tests.test_speed import Waits

CPU = torch.device("cpu")
TAUGHT, DATA = {"network": "resnet14", "sha256": "0" * 64}, "1" * 64
VIEWS = 3


def loader(seed: int = 0, views: int | None = VIEWS, augment: Augment = Augment(2, True), batch_size: int = 8) -> Resident:
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (tiny.SAMPLES, 3, tiny.SIZE, tiny.SIZE), generator=g, dtype=torch.uint8)
    labels = torch.arange(tiny.SAMPLES) % tiny.CLASSES
    return Resident(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size, CPU, seed, augment, views=views)


def ready(root: Path, train: Batches | None = None, views: int = VIEWS, speed: Speed = Speed(), **taught: str) -> Kept:
    return answering(root, tiny.make("kd"), TAUGHT | taught, DATA, train or loader(), views, speed)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.float16"))


def counted(net: Net, calls: list[int]) -> Answer:
    def answer(images: Tensor) -> Features:
        calls.append(len(images))
        return net.features(images)

    return answer


# --- what is in it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [Speed(), Speed(bf16=True, channels_last=True)], ids=str)
def test_it_answers_as_the_teacher_does_rounded_to_float16(tmp_path: Path, speed: Speed) -> None:
    train, method = loader(seed=3), tiny.make("kd")
    said = ready(tmp_path, train, speed=speed)
    epochs = range(1, 2 * VIEWS + 2)
    with quick(method, method.teacher, speed):
        for number in epochs:
            for batch in train.epoch(number):
                ours, theirs = said(batch), method.teacher.features(batch.images)
                for a, b in ((ours.logits, theirs.logits), (ours.embedding, theirs.embedding)):
                    assert a.dtype == torch.float32
                    torch.testing.assert_close(a, b, rtol=2e-2 if speed.bf16 else 1e-3, atol=2e-2 if speed.bf16 else 1e-5)


def test_an_answer_makes_no_host_wait(tmp_path: Path) -> None:
    said, batch = ready(tmp_path), next(iter(loader().epoch(2)))
    with Waits() as waits:
        said(batch)
    assert not waits.found


def test_it_is_the_float16_of_the_teacher_in_the_splits_own_order(tmp_path: Path) -> None:
    train, method = loader(seed=7), tiny.make("kd")
    said = ready(tmp_path, train)
    plan = torch.arange(tiny.SAMPLES).split(8)
    for view in range(1, VIEWS + 1):
        with quick(method, method.teacher, Speed()):
            found = [method.teacher.features(b.images) for b in train.shown(view, plan)]
        logits, embedding = said.said[view - 1]
        assert torch.equal(logits, torch.cat([f.logits for f in found]).half())
        assert torch.equal(embedding, torch.cat([f.embedding for f in found]).half())
    assert not torch.equal(said.said[0][0], said.said[1][0])


def test_all_seeds_share_it_and_it_is_the_same_whoever_asks_first(tmp_path: Path) -> None:
    for seed in (0, 1):
        ready(tmp_path / f"by{seed}", loader(seed))
        ready(tmp_path / "both", loader(seed))
    ours, theirs, shared = (files(tmp_path / name) for name in ("by0", "by1", "both"))
    assert len(shared) == VIEWS
    for a, b, c in zip(ours, theirs, shared, strict=True):
        assert a.read_bytes() == b.read_bytes() == c.read_bytes()


def test_the_teacher_is_not_asked_again_and_views_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size, calls = Size(tiny.SAMPLES, tiny.CLASSES, 64), []
    cache, answer = Cache(tmp_path, {}, size), counted(tiny.make("kd").teacher, calls)
    cache.fill(1, loader(), answer)
    assert sum(calls) == tiny.SAMPLES
    cache.fill(1, loader(), answer)
    assert sum(calls) == tiny.SAMPLES
    first = cache.path(1).read_bytes()
    cache.fill(VIEWS, loader(), answer)
    assert sum(calls) == VIEWS * tiny.SAMPLES
    assert cache.path(1).read_bytes() == first
    assert cache.path(1).stat().st_size == size.file == 2 * tiny.SAMPLES * (tiny.CLASSES + 64) + 32
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (
        first
        == f"the teacher's answers: 1 view of 20 images x (4 logits + 64 of the embedding) x 2 bytes, 0.0 MB, in {cache.folder}"
    )
    assert last.startswith("view 3 of 3 is kept (")


@pytest.mark.parametrize(("name", "hp"), [("kd", {}), ("crd", {}), ("refilled", {}), ("sakd", {"of": "rkd"})], ids=tiny.label)
def test_a_student_taught_from_it_is_the_one_taught_by_a_teacher_that_rounds(
    name: str, hp: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, over more epochs than views; the teacher here rounds answers that it gave in the split's own order."""
    again, shown = tiny.make(name, hp), loader(seed=2)
    net = again.teacher
    plan = torch.arange(tiny.SAMPLES).split(8)
    rounded: list[list[Tensor]] = []
    with torch.no_grad(), quick(again, net, Speed()):
        for view in range(1, VIEWS + 1):
            parts = [net.features(b.images)[-2:] for b in loader(views=None).shown(view, plan)]
            rounded.append([torch.cat(part).half().float() for part in zip(*parts, strict=True)])

    def rounds(batch: Batch) -> Features:
        e, z = rounded[(batch.epoch - 1) % VIEWS]
        return net.features(batch.images)._replace(embedding=e[batch.ids], logits=z[batch.ids])

    states = []
    kept = answering(tmp_path, tiny.make(name, hp), TAUGHT, DATA, shown, VIEWS, Speed())
    for teach in (kept, rounds, partial(teacher_features, net)):
        method = tiny.make(name, hp)
        torch.manual_seed(3)
        training = Training(method, Optim(epochs=2 * VIEWS + 1, lr=0.01, milestones=()), tiny.loader(None), tiny.quiet)
        states.append(fit([training], teach, shown, tiny.silently)[0].last)
    assert tiny.same(states[0], states[1])
    assert not tiny.same(states[0], states[2]), "rounding is seen"


# --- what is refused -------------------------------------------------------------------------------------------------------


def changed(root: Path, **how: Any) -> int:
    """How many caches there are when one has been asked for with something changed."""
    ready(root)
    ready(root, **how)
    return len(list(root.iterdir()))


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("teacher", {"sha256": "2" * 64}),
        ("outputs", {"cut": "0, 1"}),
        ("augmentation", {"train": loader(augment=Augment(1, True))}),
        ("batches", {"train": loader(batch_size=4)}),
        ("precision", {"speed": Speed(bf16=True)}),
        ("nothing", {}),
        ("seed", {"train": loader(seed=9)}),
    ],
)
def test_another_teacher_or_way_has_a_cache_of_its_own(what: str, how: dict[str, Any], tmp_path: Path) -> None:
    assert changed(tmp_path, **how) == (1 if what in ("nothing", "seed") else 2)


def test_other_data_and_code_are_other_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = facts(TAUGHT, DATA, loader(), Speed())
    assert facts(TAUGHT, DATA, loader(), Speed()) == ours
    assert facts(TAUGHT, "2" * 64, loader(), Speed()) != ours
    monkeypatch.setattr(caches, "CODE", caches.CODE[1:])
    assert facts(TAUGHT, DATA, loader(), Speed()) != ours


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_byte_is_refused(place: int, tmp_path: Path) -> None:
    ready(tmp_path)
    path = files(tmp_path)[1]
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"view2\.float16 is damaged or of something else.*delete it, it is filled again"):
        ready(tmp_path)
    path.unlink()
    ready(tmp_path)


def test_numbers_of_another_teacher_view_or_length_are_refused(tmp_path: Path) -> None:
    ready(tmp_path / "a", sha256="a" * 64)
    ready(tmp_path / "b", sha256="b" * 64)
    (first, second, _), others = files(tmp_path / "a"), files(tmp_path / "b")
    right = first.read_bytes()
    for wrong in (others[0].read_bytes(), second.read_bytes(), right[:-2], right + b"0", b""):
        first.write_bytes(wrong)
        with pytest.raises(UserError, match="damaged or of something else"):
            ready(tmp_path / "a", sha256="a" * 64)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    def loud(images: Tensor) -> Features:
        f = tiny.make("kd").teacher.features(images)
        return f._replace(logits=torch.full_like(f.logits, 7e4))

    cache = Cache(tmp_path, {}, Size(tiny.SAMPLES, tiny.CLASSES, 64))
    with pytest.raises(UserError, match=r"float16 cannot hold what the teacher says \(up to 7e\+04\); use views=null"):
        cache.fill(1, loader(), loud)
    assert cache.missing(1) == [1]


def test_a_full_disk_is_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 0, 7000))  # type: ignore[attr-defined]
    with pytest.raises(UserError) as told:
        ready(tmp_path)
    assert str(told.value).startswith(
        "views: 3 views of 20 images x (4 logits + 64 of the embedding) x 2 bytes, 0.0 MB, and the disk of "
    )
    assert str(told.value).endswith(" has 0.0 MB left; make room, or lower views")
    assert not files(tmp_path)


# --- a filling that is broken off, and two at once -------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_filling_that_was_broken_off_goes_on_with_the_view_it_was_at(tmp_path: Path) -> None:
    size, calls, teacher = Size(tiny.SAMPLES, tiny.CLASSES, 64), [], tiny.make("kd").teacher

    def dies(images: Tensor) -> Features:
        if len(calls) == 4:  # in the midst of the second view
            raise Killed
        return counted(teacher, calls)(images)

    cache = Cache(tmp_path, {}, size)
    with pytest.raises(Killed):
        cache.fill(VIEWS, loader(), dies)
    assert cache.missing(VIEWS) == [2, 3]
    calls.clear()
    cache.fill(VIEWS, loader(), counted(teacher, calls))
    assert sum(calls) == 2 * tiny.SAMPLES
    whole = Cache(tmp_path / "whole", {}, size)
    whole.fill(VIEWS, loader(), teacher.features)
    for view in range(1, VIEWS + 1):
        assert cache.path(view).read_bytes() == whole.path(view).read_bytes()


def test_it_can_be_asked_to_stop_between_batches_and_while_it_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []

    def halt() -> None:
        heard.append(1)
        if len(heard) > 4:
            raise Killed

    cache = Cache(tmp_path, {}, Size(tiny.SAMPLES, tiny.CLASSES, 64))
    with pytest.raises(Killed):
        cache.fill(VIEWS, loader(), tiny.make("kd").teacher.features, halt)
    assert cache.missing(VIEWS) == [2, 3]
    capsys.readouterr()
    with caches.alone(cache.folder / "lock", caches.go_on), pytest.raises(Killed):
        cache.fill(VIEWS, loader(), tiny.make("kd").teacher.features, halt)
    assert capsys.readouterr().out == f"{cache.folder} is being filled by process {os.getpid()}: waiting\n"


def slowly(root: Path, said: Any) -> None:
    """One of two processes that fill the same cache."""
    torch.set_num_threads(1)
    calls: list[int] = []
    teacher = tiny.make("kd").teacher

    def answer(images: Tensor) -> Features:
        time.sleep(0.1)
        return counted(teacher, calls)(images)

    cache = Cache(root, {}, Size(tiny.SAMPLES, tiny.CLASSES, 64))
    caches.print = lambda *words, **how: said.put((os.getpid(), " ".join(words)))  # type: ignore[attr-defined]
    cache.fill(2, loader(), answer)
    assert not cache.missing(2)
    said.put((os.getpid(), f"asked {sum(calls)}"))


def test_of_two_processes_one_fills_and_the_other_waits_and_says_for_whom(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    both = [context.Process(target=slowly, args=(tmp_path, said)) for _ in range(2)]
    for process in both:
        process.start()
    lines: dict[int | None, list[str]] = {process.pid: [] for process in both}
    while sum(line.startswith("asked") for found in lines.values() for line in found) < 2:
        pid, line = said.get(timeout=120)
        lines[pid].append(line)
    for process in both:
        process.join()
        assert process.exitcode == 0
    filled, waited = sorted(lines, key=lambda pid: lines[pid][-1] != f"asked {2 * tiny.SAMPLES}")
    assert lines[filled][-1] == f"asked {2 * tiny.SAMPLES}"
    assert lines[waited][-1] == "asked 0"
    assert [line for line in lines[waited] if "waiting" in line] in (
        [f"{next(tmp_path.iterdir())} is being filled by process {filled}: waiting"],
        [],  # it came when all was done
    )


# --- which methods ---------------------------------------------------------------------------------------------------------

READERS = "mlkd fitnet at sp vid ab ft fsp nst kdsvd semckd simkd ofd reviewkd sakd"
OTHERS = "kd kdmse dkd nkd dist wttm ls ctkd uskd cc rkd pkt crd srrl thkd kde kdeth crdth cskd refilled"
DEPENDS = {  # settings that change what is read
    ("sakd", "of=crd"): True,
    ("ofd", "teacher_mode=train"): True,  # reads a copy of its own, not the teacher
    ("sakd", "of=vid-mode=both"): True,
    ("sakd", "of=rkd-mode=random"): True,
    ("refilled", "then=simkd"): False,
}


def reads_what_is_kept(name: str, hp: dict[str, Any]) -> bool:
    """Whether its losses are the same numbers when nothing else of the teacher can be read."""
    method = tiny.make(name, hp)
    batch, t = tiny.first_batch(), method.teacher.features(tiny.first_batch().images)
    for phase in method.phases():
        if phase.before is not None:
            phase.before([batch])
        found = []
        for given in (t, caches.kept(t, t.embedding, t.logits)):
            again = tiny.make(name, hp)
            again.load_state_dict(method.state_dict())
            here = next(p for p in again.phases() if p.name == phase.name)
            torch.manual_seed(0)
            try:
                found.append({key: term.raw.item() for key, term in again(batch, given, here.loss).items()})
            except NotKept:
                return False
        assert found[0] == found[1]
    return True


@pytest.mark.parametrize(("name", "hp"), [*tiny.VARIANTS, ("sakd", {"of": "crd"}), ("ctkd", {"of": "ls"})], ids=tiny.label)
def test_every_method_is_let_in_by_what_it_reads(name: str, hp: dict[str, Any]) -> None:
    method = tiny.make(name, hp)
    before = tiny.state(method)
    torch.manual_seed(1)
    try:
        refuse_readers(name, method, 4, tiny.SIZE)
        fits, told = True, ""
    except UserError as e:
        fits, told = False, str(e)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    assert tiny.same(tiny.state(method), before), "it is tried on a copy"
    known = dict.fromkeys(READERS.split(), False) | dict.fromkeys(OTHERS.split(), True)
    assert fits == DEPENDS.get((name, tiny.label(hp)), known.get(name, fits))
    assert fits == (name != "mlkd" and reads_what_is_kept(name, hp))
    assert fits or told.startswith(
        "mlkd shows the teacher a second view of each image, and views=4"
        if name == "mlkd"
        else f"{name} reads more of the teacher than its logits and embeddings, which are all that views=4 keeps; use"
    )


def test_the_methods_named_here_are_methods() -> None:
    assert METHODS.keys() >= {*READERS.split(), *OTHERS.split()}
    assert not set(READERS.split()) & set(OTHERS.split())


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x.shape,
        lambda x: torch.ones(2) * x,
        lambda x: torch.nn.functional.relu(x),
        lambda x: x.float(),
        lambda x: x[0],
        lambda x: torch.nn.functional.mse_loss(torch.ones(2), x),
    ],
)
def test_what_is_absent_cannot_be_used(use: Any) -> None:
    with pytest.raises(NotKept, match="more of the teacher than its logits and embeddings"):
        use(ABSENT)


def test_what_is_read_without_being_found_out_is_one_line_too(tmp_path: Path) -> None:
    said, train = ready(tmp_path), loader()
    batch: Batch = next(iter(train.epoch(1)))
    method = tiny.make("at")
    with pytest.raises(UserError, match="views: the method reads more of the teacher"):
        method(batch, said(batch), method.phases()[0].loss)


# --- by the stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_share_it_among_methods_seeds_and_processes(tmp_path: Path) -> None:

    def done(name: str, *words: str) -> str:
        ended = stage(tmp_path, name, *words)
        assert not ended.returncode, ended.stderr
        return ended.stdout

    page = ("data.val_images=10", "data.test_images=20", "data.train_images=42")
    done("prepare", *page, "out=data", "record=prepared")
    usual = (*page, "prepared=data", "device=cpu")
    done("train", *usual, "train.role=teacher", "train.network=resnet14", "teacher.optim.epochs=1", "out=taught", "record=r")
    words = (*usual, "distill.checkpoint=taught", "views=2", "optim.epochs=3", "optim.batch_size=10", "optim.lr=1e-6")
    said = {}
    for who, more in {
        "one": ("distill.method=kd",),
        "two": ("distill.method=kd", "processes=2"),
        "seed": ("distill.method=srrl", "distill.seed=1"),
    }.items():
        said[who] = done("distill", *words, *more, f"out={who}", f"record=record-{who}")
    (folder,) = (tmp_path / ".work/cache").iterdir()
    assert [path.name for path in files(tmp_path / ".work/cache")] == ["view1.float16", "view2.float16"]
    assert "42 images x (10 logits + 64 of the embedding) x 2 bytes" in said["one"]
    assert {who for who, text in said.items() if "is kept" in text} == {"one"}
    ones, twos = ([line["values"] for line in record.read_metrics(tmp_path / f"record-{who}")] for who in ("one", "two"))
    for a, b in zip(ones, twos, strict=True):
        assert b["distil/kl"] == pytest.approx(a["distil/kl"], rel=5e-5)  # at this learning rate the weights stay
    assert record.read(tmp_path / "record-one")["params"]["views"] == 2
    (folder / "view2.float16").unlink()
    assert done("distill", *words, "distill.method=kd", "out=again", "record=record-again").count("is kept") == 1
    for path in ("model.safetensors", "predictions.safetensors"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
