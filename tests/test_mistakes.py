"""What a user can get wrong: one clear line, exit status 2, before anything is trained, and nothing written."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import assemble, checkpoint, config
from pupil import settings as settings_of
from pupil.data import prepare
from pupil.feeds import loaders as load_batches
from pupil.models import build
from pupil.sealed import read_sealed
from tests import tiny
from tests.inprocess import at_home, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning"),  # runpy runs it again, on purpose
]

PAGE = """
teachers: [resnet8]
students: [resnet8]
methods: [kd]
seeds: [0, 1]
data: {name: digits, image_size: 16, train_images: 40, val_images: 10, test_images: 20, pad: 1}
optim: {epochs: 1, batch_size: 20, lr: 0.05, milestones: [], schedule: cosine}
teacher:
  optim: {epochs: 1, batch_size: 20, lr: 0.05, milestones: [], schedule: cosine}
hp:
  crd: {k: 16, dim: 8}
"""
TEACHER = Path("out/models/teacher/resnet8")


# --- a checkout in which everything is right ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml, prepared digits, trained teachers of width 64 (resnet8) and 256 (resnet8x4), two image folders."""
    root = tmp_path_factory.mktemp("sound") / "checkout"
    root.mkdir()
    (root / "params.yaml").write_text(PAGE)
    settings = config.resolve(settings_of.overlay(settings_of.defaults(), config.read_params(root / "params.yaml")))
    (root / "box.json").write_text(json.dumps({k: v for k, v in settings_of.plain(settings).items() if k != "given"}))
    prepare(settings.data, root / "out/data")
    for network in ("resnet8", "resnet8x4"):
        train_teacher(root, settings, network)
    for name in ("cat", "dog"):
        (root / "pets" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(root / "pets" / name / f"{i}.png")
    return root


def train_teacher(root: Path, settings: config.Settings, network: str) -> None:
    """One epoch, without a record."""
    roles = settings_of.Train(role="teacher", network=network)
    mine = config.dataclasses.replace(settings, train=roles, prepared=str(root / "out/data"))
    data = assemble.prepared(mine)
    job = assemble.single(mine, data)
    feeds = load_batches(data, 20, 0, torch.device("cpu"))
    trained = tiny.fit(job.method, None, feeds.train, feeds.val, job.optim, tiny.quiet, tiny.silently)
    meta = {**job.meta, **{key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(root / "out/models/teacher" / network, trained.last, meta)


@pytest.fixture
def checkout(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working folder and as the home of `pupil`."""
    root = tmp_path / "checkout"
    shutil.copytree(sound, root)
    at_home(root, monkeypatch)
    return root


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}


# --- how a checkout goes wrong --------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def page(old: str, new: str) -> Spoil:
    """params.yaml with one text replaced."""

    def spoil(root: Path) -> None:
        path = root / "params.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return spoil


def text(path: str | Path, content: str) -> Spoil:
    return lambda root: (root / path).write_text(content)


def cut(path: str | Path) -> Spoil:
    """The last byte is lost."""
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-1])


def flip(path: str | Path) -> Spoil:
    """The last byte has changed."""

    def spoil(root: Path) -> None:
        raw = (root / path).read_bytes()
        (root / path).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    return spoil


def edit(path: str | Path, **change: object) -> Spoil:
    """By somebody else, who leaves no checksum."""
    return lambda root: (root / path).write_text(json.dumps({**read_sealed(root / path), **change}))


def lose(path: str | Path) -> Spoil:
    return lambda root: (root / path).unlink() if (root / path).is_file() else shutil.rmtree(root / path)


def empty_class(root: Path) -> None:
    (root / "pets/eel").mkdir()


def blank(root: Path) -> None:
    (root / "pets/cat/3.png").write_bytes(b"no image")


def occupied(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine/notes.txt").write_text("precious")


def published(classes: int) -> Spoil:
    """A file of RepDistiller's with so many outputs."""
    return lambda root: torch.save(
        {"epoch": 1, "model": build("resnet8", classes).state_dict(), "best_acc": 0.5}, root / "a.pth"
    )


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def hostile(root: Path) -> None:
    torch.save({"model": build("resnet8", 10).state_dict(), "opt": Runs()}, root / "a.pth")


class Mistake(NamedTuple):
    line: str  # what is typed: a stage or a command of `python -m pupil`, and arguments
    said: str  # part of the answer
    also: str = ""  # another part
    spoil: Spoil | None = None


IMPORT = "train train.role=teacher"
FOLDER = "prepare data.name=folder data.train_images=null data.val_images=null data.test_images=null"

MISTAKES = [
    # names
    Mistake("distill distill.method=simkt", "there is no 'simkt'; did you mean 'simkd'?", "distill.method"),
    Mistake("train methods=[kd,fitnets]", "there is no 'fitnets'; did you mean 'fitnet'?", "methods"),
    Mistake("train train.network=resnet9", "there is no 'resnet9'; did you mean 'resnet", "train.network"),
    Mistake("check teachers=[wrn-16-1]", "did you mean 'wrn_16_1'?", "'wrn-16-1'"),
    Mistake("check students=[transformer]", "there is no 'transformer'; known: resnet8,"),
    Mistake("prepare data.name=cifar-100", "did you mean 'cifar100'?", "'cifar-100'"),
    Mistake("train train.role=teachers", "did you mean 'teacher'?", "'teachers'"),
    Mistake("train optim.schedule=cosin", "did you mean 'cosine'?", "optim.schedule"),
    Mistake("train protocol.deploy=best", "did you mean 'best_by_val'?", "protocol.deploy"),
    # keys
    Mistake("train optim.epoch=3", "unknown key 'optim.epoch'", "did you mean 'optim.epochs'?"),
    Mistake("distill hp.simkd.facter=2", "unknown key 'hp.simkd.facter'", "did you mean 'hp.simkd.factor'?"),
    Mistake("train +optim.warmup=3", "unknown key 'optim.warmup'"),
    Mistake("train ~optim.lr", "'~optim.lr'"),
    Mistake("train 'optim={lr:0.1,wd:0.1}'", "optim.wd", "did you mean"),
    Mistake("train optim.lr", "cannot read the override 'optim.lr'", "write key=value"),
    Mistake("train '--overrides' 'optim.lr=\"0.1'", "cannot read --overrides", "optim.lr="),
    Mistake("check optim.lr=", "optim.lr: expected a number, got ''"),
    Mistake("check optim.lrr=1", "did you mean 'optim.lr'?", "'optim.lrr'"),
    Mistake("resolve optim.lrr=1", "did you mean 'optim.lr'?", "'optim.lrr'"),
    Mistake("train teacher.optim.lr=0.1", "teacher.optim.lr has no effect on this stage"),
    Mistake("train train.role=teacher optim.lr=0.1", "optim.lr has no effect on this stage"),
    Mistake("train hp.kd.T=2", "hp.kd.T has no effect on this stage"),
    Mistake("distill hp.crd.k=4", "hp.crd.k has no effect on this stage", "hp.kd"),
    Mistake("prepare optim.lr=0.1", "optim.lr has no effect on this stage"),
    Mistake("evaluate optim.lr=0.1", "optim.lr has no effect on this stage"),
    Mistake("train train.head_of=out/models/teacher/resnet8", "train.head_of has no effect"),
    # types
    Mistake("train optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
    Mistake("train optim.epochs=1.5", "optim.epochs: expected a whole number, got 1.5"),
    Mistake("train optim.epochs=true", "optim.epochs: expected a whole number, got True"),
    Mistake("train optim.nesterov=1", "optim.nesterov: expected true or false, got 1"),
    Mistake("train seeds=0", "seeds: expected a list such as [0, 1], got 0"),
    Mistake("train methods=kd", "methods: expected a list such as [name], got 'kd'"),
    Mistake("train methods=[kd,1]", "methods[1]: expected a text, got 1"),
    Mistake("train optim=3", "optim is a section", "got 3"),
    Mistake("train hp=null", "hp is a section", "got None"),
    Mistake("train data.classes=five", "data.classes: expected a list", "got 'five'"),
    Mistake("train 'optim.lr=${teacher.optim.lr}'", "${teacher.optim.lr}"),
    # impossible values
    Mistake("train optim.epochs=-1", "optim.epochs: expected 1 or more, got -1"),
    Mistake("train optim.lr=0", "optim.lr: expected greater than 0, got 0.0"),
    Mistake("train optim.lr=nan", "optim.lr: expected a number, got nan"),
    Mistake("train optim.lr=inf", "optim.lr: expected a number, got inf"),
    Mistake("train train.role=teacher teacher.optim.batch_size=0", "teacher.optim.batch_size: expected 1 or more, got 0"),
    Mistake("train optim.momentum=1", "optim.momentum: expected from 0 to below 1, got 1.0"),
    Mistake("train optim.nesterov=true optim.momentum=0", "optim.nesterov needs a momentum above 0"),
    Mistake("train optim.milestones=[5,3]", "optim.milestones: expected epochs in rising order, got [5, 3]"),
    Mistake("train train.seed=-1", "train.seed: expected 0 or more, got -1"),
    Mistake("distill distill.seed=-1", "distill.seed: expected 0 or more, got -1"),
    Mistake("distill seeds=[0,-2]", "seeds[1]: expected 0 or more, got -2"),
    Mistake("distill seeds=[1,1]", "seeds: every entry once, got [1, 1]"),
    Mistake("distill methods=[kd,kd]", "methods: every entry once, got ['kd', 'kd']"),
    Mistake("distill methods=[]", "methods: at least one is needed, got an empty list"),
    Mistake("check seeds=[]", "seeds: at least one is needed, got an empty list"),
    Mistake("distill hp.kd.T=0", "hp.kd.T: expected greater than 0, got 0.0"),
    Mistake("distill hp.kd.ce=-1", "hp.kd.ce: expected 0 or more, got -1.0"),
    Mistake("distill hp.kd.ce=0 hp.kd.kl=0", "hp.kd: ce, kl and beta are all 0"),
    Mistake("distill hp.kd.beta=1", "hp.kd.beta must be 0, got 1.0"),
    Mistake("distill distill.method=simkd hp.simkd.factor=0", "hp.simkd.factor must be from 1", "got 0"),
    Mistake("distill distill.method=simkd hp.simkd.factor=65", "the teacher's 64 channels, got 65"),
    Mistake("distill distill.method=fitnet hp.fitnet.hint=9", "hp.fitnet.hint must be from 0 (stem) to 3", "got 9"),
    Mistake("distill distill.method=thkd hp.thkd.mix=2", "hp.thkd.mix must be from 0", "got 2.0"),
    Mistake("distill distill.method=thkd hp.thkd.T_head=0", "hp.thkd.T_head must be greater than 0"),
    Mistake("distill distill.method=crd hp.crd.k=0", "hp.crd.k", "got 0, 8"),
    Mistake("distill distill.method=crd hp.crd.tau=0", "tau must be positive"),
    Mistake("distill distill.method=crd hp.crd.momentum=1", "hp.crd.momentum must be from 0 to below 1, got 1.0"),
    Mistake("prepare data.classes=[3,12]", "class 12 of 10"),
    Mistake("prepare data.classes=[3,seven]", "there is no class 'seven'"),
    Mistake("prepare data.classes=[3]", "2 classes or more"),
    Mistake("prepare data.image_size=4", "data.image_size is 4"),
    Mistake("prepare data.train_images=9999", "train 9999", "data.train_images"),
    Mistake("prepare data.train_images=-1", "data.train_images is -1"),
    Mistake("check data.image_size=4", "data.image_size is 4"),
    Mistake("check data.classes=11", "data.classes is 11: a number of classes is from 2 to 10"),
    Mistake("check data.unreadable=skip", "data.unreadable is 'skip': stop or drop"),
    Mistake("check data.per_class=0 data.train_images=null", "data.per_class is 0: 1 or more"),
    Mistake("check data.per_class=3 data.train_images=40", "data.per_class and data.train_images are both given"),
    Mistake("check data.relabel=cskd", "data.relabel=cskd renumbers the classes of data.classes, which is not given"),
    Mistake("check data.overlap=2", "data.overlap is 2: the share"),
    Mistake("check data.overlap=0.5 data.classes=5", "data.overlap and data.classes are both given"),
    Mistake("check data.teacher_classes=[]", "data.teacher_classes is []: 2 classes or more"),
    Mistake("check data.teacher_classes=[3,4,5]", "kd needs a teacher of the student's classes", "on maps or embeddings: "),
    Mistake("check recipe=simkd/cifar10", "there is no recipe 'simkd/cifar10'", "`python -m pupil recipe` lists all"),
    Mistake("check data.fold=1", "data.folds and data.fold go together"),
    Mistake("check data.folds=5 data.fold=5 data.val_images=null", "data.fold is 5 of 5: folds are 0 to 4"),
    Mistake("prepare data.name=cub200", "data.path is not given", "CUB_200_2011.tgz"),
    Mistake("prepare data.name=shards", "data.path is not given", "the .tar files of a folder"),
    Mistake("check data.name=shards data.path=pets", "data.path is 'pets': no .tar file is there"),
    Mistake("train views=0", "views: expected 1 or more, or null, got 0"),
    Mistake("train train.role=teacher views=4", "views has no effect on this stage"),
    Mistake("distill distill.method=at views=4", "at reads more of the teacher than its logits and embeddings", "views=null"),
    Mistake("distill distill.method=mlkd views=4", "mlkd shows the teacher a second view", "views=null"),
    Mistake("check methods=[kd,simkd] views=2", "simkd reads more of the teacher than its logits", "views=null"),
    Mistake("train device=tpu", "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    Mistake("train device=cuda:x", "device: ", "cuda:x"),
    Mistake("distill device=cuda:99", "device: ", "cuda:99"),
    # params.yaml
    Mistake("train", "params.yaml is not there", spoil=lose("params.yaml")),
    Mistake("train", "params.yaml is not valid YAML", spoil=text("params.yaml", "optim: {lr: 0.1")),
    Mistake("train", "params.yaml must hold `key: value` lines", spoil=text("params.yaml", "- lr\n- epochs\n")),
    Mistake("train", "params.yaml is not valid YAML", spoil=text("params.yaml", PAGE + "seeds: [3]\n")),
    Mistake("train", "unknown key 'optims'", "did you mean 'optim'?", page("\noptim:", "\noptims:")),
    Mistake("train", "unknown key 'hp.dkdd'", spoil=page("  crd:", "  dkdd: {ce: 1.0}\n  crd:")),
    Mistake("evaluate", "unknown key 'data.image-size'", "did you mean 'data.image_size'?", page("image_size", "image-size")),
    Mistake("train", "hp.crd is a section", "got 3", page("{k: 16, dim: 8}", "3")),
    Mistake("train", "data is a section", "got 'digits'", page("data: {", "data: digits\nother: {")),
    Mistake("train", "'${seeds[0]}' stands for another value", "params.yaml", page("[0, 1]", "[0, '${seeds[0]}']")),
    Mistake("train", "'${teacher}' stands for another value", spoil=page("\nseeds", "\nexperiment: ${teacher}\nseeds")),
    Mistake("sync", "unknown key 'sed'", spoil=page("\nseeds", "\nsed: 1\nseeds")),
    # a configuration file
    Mistake("train --config", "--config needs the file", "nothing"),
    Mistake("train --config nowhere.json", "--config needs the file", "nowhere.json"),
    Mistake("train --config params.yaml", "--config params.yaml is not JSON"),
    Mistake("train --config a.json", "must hold a JSON object, got list", "a.json", text("a.json", "[1]")),
    Mistake("train --config box.json optim.lrr=1", "did you mean 'optim.lr'?", "'optim.lrr'"),
    Mistake("train --config box.json optim.lr", "write key=value"),
    Mistake("train --config box.json optim=3", "optim is a section", "got 3"),
    Mistake("train --config box.json optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
    Mistake("train --config box.json", "unknown key 'optimizer'", spoil=edit("box.json", optimizer={})),
    # data
    Mistake(f"{FOLDER} data.path=nowhere", "'nowhere': there is no such folder or .zip file"),
    Mistake(FOLDER, "data.path is not given"),
    Mistake(f"{FOLDER} data.path=pets", "'eel'", "0 images", empty_class),
    Mistake(f"{FOLDER} data.path=pets", "cannot read image cat/3.png", spoil=blank),
    Mistake(f"{FOLDER} data.path=pets.zip", "'pets.zip': neither a folder nor a .zip", spoil=text("pets.zip", "no zip")),
    Mistake(f"{FOLDER} data.path=pets data.classes=[cat,dgo]", "did you mean 'dog'?", "'dgo'"),
    Mistake("prepare data.path=pets", "digits comes with scikit-learn and reads no path"),
    Mistake("train prepared=nowhere", "no prepared data in nowhere"),
    Mistake("train data.image_size=32", "out/data was prepared with data.image_size = 16, now it is 32"),
    Mistake("train", "out/data was prepared with data.pad = 1, now it is 2", spoil=page("pad: 1", "pad: 2")),
    Mistake("train", "out/data is damaged", spoil=text("out/data/manifest.json", "{")),
    Mistake("train", "format None", spoil=text("out/data/manifest.json", "[]")),
    Mistake("train", "format 9", spoil=edit("out/data/manifest.json", version=9)),
    Mistake("train", "train.safetensors is missing", spoil=lose("out/data/train.safetensors")),
    Mistake("train", "out/data", "damaged", cut("out/data/val.safetensors")),
    Mistake("train", "out/data/train.safetensors is damaged", spoil=flip("out/data/train.safetensors")),
    # teachers
    Mistake("distill", f"{TEACHER}: model.json is not there", "train it first", lose(TEACHER)),
    Mistake("distill distill.checkpoint=nowhere", "no trained network in", "nowhere"),
    Mistake("distill distill.teacher=resnet14", "no trained network in", "resnet14"),
    Mistake(f"distill distill.teacher=resnet14 distill.checkpoint={TEACHER}", "holds a resnet8", "asked for is resnet14"),
    Mistake("distill", f"{TEACHER}/model.json is damaged", spoil=text(TEACHER / "model.json", "{")),
    Mistake("distill", f"{TEACHER}/model.json is damaged", spoil=text(TEACHER / "model.json", "[]")),
    Mistake("distill", f"{TEACHER}/model.json is damaged", spoil=text(TEACHER / "model.json", '{"network": "resnet8"}')),
    Mistake("distill", "'resnet9'", "not known here", edit(TEACHER / "model.json", network="resnet9")),
    Mistake("distill", "does not fit", "resnet14", edit(TEACHER / "model.json", network="resnet14")),
    Mistake("distill", f"{TEACHER}/model.safetensors is damaged", spoil=flip(TEACHER / "model.safetensors")),
    Mistake("distill", f"{TEACHER}/model.safetensors is damaged", spoil=cut(TEACHER / "model.safetensors")),
    Mistake("distill", f"{TEACHER}/model.safetensors is missing", spoil=lose(TEACHER / "model.safetensors")),
    Mistake("distill", "was trained on 10 classes", "the data has 10", edit(TEACHER / "model.json", classes=[*"abcdefghij"])),
    Mistake("distill distill.teacher=resnet8x4 distill.method=thkd", "equally wide, got 64 and 256", "use simkd"),
    Mistake("check methods=[thkd] teachers=[resnet8x4]", "equally wide, got 64 and 256"),
    Mistake("check shkd=[resnet8x4]", "got 256 and 64", "resnet8x4"),
    Mistake("train train.role=shkd train.network=resnet14", "no trained network in", "student/resnet8/0"),
    Mistake(f"train train.role=shkd train.network=resnet8x4 train.head_of={TEACHER}", "got 256 and 64"),
    # networks that are imported
    Mistake(f"{IMPORT} teacher.checkpoint=nowhere.pth", "teacher.checkpoint: cannot read", "nowhere.pth: No such file"),
    Mistake("train student.checkpoint=params.yaml", "student.checkpoint: params.yaml is truncated, damaged or no checkpoint"),
    Mistake(
        f"{IMPORT} teacher.checkpoint=a.pth train.network=resnet14", "not those of resnet14", "they fit resnet8", published(10)
    ),
    Mistake(f"{IMPORT} teacher.checkpoint=a.pth", "has 4 outputs, the prepared data 10 classes", "a.pth", published(4)),
    Mistake(f"{IMPORT} teacher.checkpoint=a.pth", "names posix.system", "nothing of the file was run", hostile),
    Mistake("check student.checkpoint=a.pth", "student.checkpoint: a.pth has 4 outputs", spoil=published(4)),
    Mistake("check teachers=[resnet8,resnet14] teacher.checkpoint=a.pth", "is one network for 2 names", "write {network}"),
    Mistake("check 'teacher.checkpoint=\"{seed}.pth\"'", "teacher.checkpoint: {seed} stands for nothing; known: {network}"),
    Mistake("check teacher.checkpoint=''", "teacher.checkpoint: expected the path of a file or of a model folder, or null"),
    Mistake(f"check teacher.checkpoint={TEACHER}", "is where the pipeline writes", "copy the folder to another place"),
    Mistake(f"{IMPORT} teacher.checkpoint=a.pth teacher.optim.lr=1", "teacher.optim.lr has no effect", "teacher.checkpoint"),
    # where to write
    Mistake("train out=new", "out and record go together"),
    Mistake("distill record=new", "out and record go together"),
    Mistake("train out=mine record=new", "mine is not empty", "nothing is overwritten", occupied),
    Mistake("train out=new record=params.yaml", "params.yaml is not empty"),
    Mistake("prepare out=mine", "mine is not empty", spoil=occupied),
    Mistake("prepare out=new record=params.yaml", "params.yaml is not empty"),
    Mistake("prepare out=new record=new", "out and record are both new"),
    Mistake("prepare loader=streamed", "loader has no effect on this stage"),
    Mistake("train loader=resdent", "there is no 'resdent'; did you mean 'resident'?", "loader"),
    Mistake("evaluate record=mine", "mine is not empty", spoil=occupied),
    Mistake("evaluate", "networks are not trained yet, first out/models/"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: re.sub(r"[^\w=.,\[\]-]+", " ", m.line + " " + m.said)[:70])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing(
    mistake: Mistake, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if mistake.spoil is not None:
        mistake.spoil(checkout)
    before = tree(checkout)
    status = run(mistake.line, monkeypatch)
    err = capfd.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert mistake.said in err
    assert mistake.also in err
    assert status == 2
    assert tree(checkout) == before


def test_a_store_that_cannot_be_reached_is_named_by_sync(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    before = tree(checkout)
    assert run("sync", monkeypatch) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: the tracking store http://127.0.0.1:9 cannot be used: ")
    assert err.count("\n") == 1
    assert "secret" not in err
    assert tree(checkout) == before


def test_a_training_that_breaks_down_names_the_loss_term(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # says so itself, in lines of its own
    assert run("distill optim.lr=1e9 optim.epochs=9 out=new record=log", monkeypatch) == 2
    *others, last = capfd.readouterr().err.splitlines()
    said = r"error: the loss term '(ce|kl)' became (nan|inf) in step \d+ of epoch \d+ .*; try a smaller lr\. Its \d+ images"
    assert re.match(said, last)
    assert all("tracking" in line for line in others)
    assert json.loads((checkout / "log/record.json").read_text())["status"] == "FAILED"
    assert not (checkout / "new").exists()


def test_the_sound_checkout_has_no_mistake(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(checkout)
    assert run("check methods=[kd,fitnet,simkd,thkd,crd] shkd=[resnet14]", monkeypatch) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "fine: " in out
    assert tree(checkout) == before
    assert os.environ.get("MLFLOW_RUN_ID") is None


def test_a_mistake_in_a_sweep_ends_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(checkout)
    assert run("train -m optim.lr=0,1", monkeypatch) == 2
    assert capfd.readouterr().err == "error: optim.lr: expected greater than 0, got 0.0\n"
    assert {name for name in set(tree(checkout)) - set(before) if not name.startswith("runs/multirun")} == {"runs"}
