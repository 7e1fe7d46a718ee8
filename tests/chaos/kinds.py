"""What is killed: every kind of training that keeps a state of its own between two steps."""

from typing import NamedTuple

from tests.chaos.lab import RESIZED


class Kind(NamedTuple):
    """A training: its stage and arguments; the folders are added."""

    name: str
    stage: str
    arguments: tuple[str, ...]
    tracked: bool = False  # by MLflow
    by: str = "fork"  # or exec: a Python of its own; dvc: dvc repro of a cell
    models: int = 1  # that it leaves

    @property
    def method(self) -> str:
        return self.arguments[0].partition("=")[2]


def cell(name: str, *arguments: str, method: str | None = None, **more: bool | str) -> Kind:
    return Kind(name, "distill", (f"distill.method={method or name}", *arguments), **more)  # type: ignore[arg-type]


SHKD = ("train.role=shkd", "train.network=resnet8", "train.head_of=out/models/teacher/resnet8")
KINDS = [
    Kind("student alone", "train", ("train.role=student", "train.network=resnet8")),
    cell("kd"),
    cell("crd (banks)", method="crd"),
    cell("refilled (phases)", "hp.refilled.init_epochs=1", "hp.refilled.init_lr=0.01", method="refilled"),
    cell("refilled, then simkd", "hp.refilled.then=simkd", "hp.refilled.init_epochs=1", method="refilled"),
    cell("sakd (policy)", method="sakd"),
    cell("simkd"),
    cell("ctkd (temperature)", method="ctkd"),
    cell("ft (warm-up)", "hp.ft.init_epochs=1", method="ft"),
    cell("kd, DOT", "optim.optimizer=dot", method="kd"),
    cell("mlkd (two views)", method="mlkd"),
    Kind("shkd", "train", SHKD),
    Kind("table, two seeds", "table", ("methods=[kd,simkd,crd,sakd]", "seeds=[0,1]"), models=8),
    cell("kd, best_by_val", "protocol.deploy=best_by_val", "protocol.papers_best_on_test=true", method="kd"),
    cell("kd, few views from a cache", "views=2", "optim.epochs=3", method="kd"),
    cell("kd, streamed", "loader=streamed", method="kd"),
    cell("kd, workers", "loader=workers", method="kd"),
    cell("kd, dali", "loader=dali", method="kd"),
    cell("kd, resized crops, workers", *RESIZED, "loader=workers", method="kd"),
    cell("crd, resized crops, dali", *RESIZED, "loader=dali", method="crd"),
    cell("kd, bf16, channels last", "precision=bf16", "layout=channels_last", method="kd"),
    cell("crd, two processes", "processes=2", method="crd", by="exec"),
    cell("kd, a Python of its own", method="kd", by="exec"),
    cell("kd, tracked", method="kd", tracked=True),
    cell("simkd by dvc, tracked", method="simkd", tracked=True, by="dvc"),
]
