"""One record folder and its MLflow run."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupil import record
from pupil.tracking.store import (
    COMPLETE,
    PIPELINE,
    RECORD,
    Store,
    find_runs,
    first_line,
    is_complete,
    is_deleted,
    locked,
    milliseconds,
)
from pupil.tracking.values import chunks, limited, metrics, plain

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric, Run


Points = dict[tuple[str, int], set[str]]  # (key, step) -> values in the store, by repr: nan is nan


class Mirror:
    """One record folder and its run.  `push` may be called at any time, by any process, any number of times."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.uid: str | None = None  # of the record
        self.opened: tuple[int, int] | None = None  # which file record.json was at first
        self.run: str | None = None  # its id, once known
        self.lines = 0  # lines of metrics.jsonl in the store
        self.logged: Points = {}  # in the store before this object: epochs that a resumed training trains again
        self.created = False  # by this object
        self.refused: list[str] = []  # values that the store would not take, and why

    def push(self) -> bool:
        """Log what the store lacks; True if nothing more will come, until a training that was interrupted goes on."""
        self.opened = self.opened or self.file()
        self.uid = self.uid or record.read(self.folder)["uid"]
        with locked(self.store.home, f"mlflow-{self.uid}") as lock:
            facts = record.read(self.folder)  # before the lines: a finished record gets no more of them
            if facts["uid"] != self.uid:  # another training's by now
                return False
            finished = facts["status"] != "RUNNING"
            if self.run is None or finished:
                record.verify(self.folder, facts if finished else {})
                run = self.find_or_create(facts)
                self.run, self.lines = run.info.run_id, 0
                if is_complete(run, facts):
                    return True
                self.reopen(run)
                self.refused = []
                self.describe(facts, run)
                self.logged = self.history(run)
            new = record.read_metrics(self.folder, self.lines)
            points = [p for line in new for p in metrics(line["values"], line["time"], line["step"])]
            self.log([p for p in points if (p.key, p.step) not in self.logged])
            self.lines += len(new)
            if finished:
                for p in points:
                    self.logged.setdefault((p.key, p.step), set()).add(repr(p.value))
                self.finish(facts, max((line["step"] for line in new), default=0))
                if not self.refused:
                    lock.unlink(missing_ok=True)  # whoever waits for it finds a complete run
        return finished and not self.refused

    def abandon(self) -> None:
        """Its writer is dead: the run is shown as killed, unless or until the training goes on."""
        with locked(self.store.home, f"mlflow-{self.uid}"):
            if self.run is not None and self.file() == self.opened:
                self.client.set_terminated(self.run, "KILLED")

    def file(self) -> tuple[int, int]:
        found = (self.folder / "record.json").stat()
        return found.st_ino, found.st_mtime_ns

    def reopen(self, run: "Run") -> None:
        """A run that was ended, and whose training goes on."""
        if COMPLETE in run.data.tags:
            self.client.delete_tag(run.info.run_id, COMPLETE)
        if run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")

    def find_or_create(self, facts: dict[str, Any]) -> "Run":
        """The one run of the record."""
        condition = f"tags.`{RECORD}` = '{facts['uid']}'"
        if found := find_runs(self.store, condition):
            return self.only(found, RECORD)
        self.created = True
        env, teacher = facts.get("environment") or {}, facts.get("teacher") or {}
        tags = {
            **(facts.get("tags") or {}),
            RECORD: facts["uid"],
            "pupil.stage": facts["stage"],
            "pupil.teacher": teacher.get("uid"),
            "mlflow.source.git.commit": env.get("git_commit"),
            "mlflow.source.name": (env.get("command") or [None])[0],
            "mlflow.source.type": "LOCAL",
        }
        if group := facts.get("group"):
            tags["mlflow.parentRunId"] = self.parent(group, facts["started"])
        tags = {key: str(value) for key, value in tags.items() if value is not None}
        self.client.create_run(self.store.experiment, milliseconds(facts["started"]), tags, facts["name"])
        return self.only(find_runs(self.store, condition), RECORD)

    def only(self, runs: Sequence["Run"], tag: str) -> "Run":
        """One of several runs of the same thing, made by a request that was answered late and so repeated; the others go."""
        if deleted := [run for run in runs if is_deleted(run)]:
            return deleted[0]  # by the user
        kept, *twins = sorted(runs, key=lambda run: (COMPLETE not in run.data.tags, -len(run.data.metrics), run.info.run_id))
        for twin in (run.info.run_id for run in twins):
            for child in find_runs(self.store, f"tags.`mlflow.parentRunId` = '{twin}'", deleted=False):
                self.client.set_tag(child.info.run_id, "mlflow.parentRunId", kept.info.run_id)
            self.client.delete_tag(twin, tag)
            self.client.delete_run(twin)
        return kept

    def parent(self, group: dict[str, str], started: float) -> str:
        """The run that stands for the group: one per key and store; that of `mlflow run` is adopted."""
        key = group["key"]
        with locked(self.store.home, "mlflow"):
            condition = f"tags.`{PIPELINE}` = '{key}'"
            if found := find_runs(self.store, condition, deleted=False):
                return self.only(found, PIPELINE).info.run_id
            if key.startswith("mlflow-") and (run := self.existing(key.removeprefix("mlflow-"))):
                self.client.set_tag(run, PIPELINE, key)
                return run
            self.client.create_run(self.store.experiment, milliseconds(started), {PIPELINE: key}, group["name"])
            run = self.only(find_runs(self.store, condition, deleted=False), PIPELINE).info.run_id
            self.client.set_terminated(run, "FINISHED")
            return run

    def existing(self, run: str) -> str | None:
        from mlflow import MlflowException

        try:
            return run if self.client.get_run(run).info.lifecycle_stage == "active" else None
        except MlflowException as e:
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def describe(self, facts: dict[str, Any], run: "Run") -> None:
        """Parameters and data set."""
        from mlflow.entities import Dataset, DatasetInput, Param

        given = {plain(key): limited(value) for key, value in facts["params"].items()}
        new = [Param(key, value) for key, value in given.items() if key not in run.data.params]
        for chunk in chunks(new, 100):
            self.send("params", chunk)
        if (data := facts.get("data")) and not (run.inputs and run.inputs.dataset_inputs):
            source = str(data.get("source") or "")
            kind = ("http", {"url": source}) if source.startswith("http") else ("local", {"uri": source})
            entity = Dataset(data["name"], str(data["digest"])[:36], kind[0], json.dumps(kind[1]))  # 36: MLflow's limit
            self.client.log_inputs(run.info.run_id, [DatasetInput(entity, [])])

    def history(self, run: "Run") -> Points:
        points: Points = {}
        for key in run.data.metrics:
            for p in self.client.get_metric_history(run.info.run_id, key):
                points.setdefault((key, p.step), set()).add(repr(p.value))
        return points

    def log(self, points: Sequence["Metric"]) -> None:
        for chunk in chunks(points, 1000):
            self.send("metrics", chunk)

    def send(self, kind: str, items: Sequence[Any]) -> None:
        """A batch; of one that the store refuses, all but the values it is refused for."""
        from mlflow import MlflowException

        assert self.run
        try:
            self.client.log_batch(self.run, items if kind == "metrics" else (), items if kind == "params" else ())
        except MlflowException as e:
            if e.error_code != "INVALID_PARAMETER_VALUE" or is_deleted(self.client.get_run(self.run)):
                raise
            if len(items) == 1:
                self.refused.append(f"{items[0].key} = {items[0].value}: {first_line(e)}")
                return
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self.send(kind, half)

    def finish(self, facts: dict[str, Any], step: int) -> None:
        """Everything that is known at the end only; the tag that says so comes last."""
        assert self.run
        run = self.client.get_run(self.run)
        done = facts.get("model") and facts["status"] == "FINISHED"
        model = self.log_model(run, (self.folder / facts["model"]).resolve(), step) if done else None
        final = metrics(facts.get("final") or {}, facts["ended"], step, model)
        self.log([p for p in final if repr(p.value) not in self.logged.get((p.key, step), ())])
        if done and not model:
            self.client.set_tag(self.run, "pupil.model", "missing")
        if any((self.folder / "artifacts").rglob("*")):
            self.client.log_artifacts(self.run, str(self.folder / "artifacts"))
        self.client.log_artifact(self.run, str(self.folder / "record.json"))
        self.client.set_terminated(self.run, facts["status"], milliseconds(facts["ended"]))
        if not self.refused:
            self.client.set_tag(self.run, COMPLETE, "true")

    def log_model(self, run: "Run", folder: Path, step: int) -> str | None:
        """The deployed network as an MLflow model, and its id; mlflow.log_model would need an active run."""
        from mlflow.entities import LoggedModelOutput

        from pupil import checkpoint, serve

        if not (folder / checkpoint.META).exists():
            return None
        meta = checkpoint.read_meta(folder)
        source = run.info.run_id
        model = self.model_of(run, "teacher" if meta.get("role") in ("teacher", "shkd") else "student")
        if model.status != "READY":
            with tempfile.TemporaryDirectory() as scratch:
                saved = serve.save(folder, meta, Path(scratch), source, model)
                self.client.log_model_artifacts(model.model_id, str(saved))
            self.client.finalize_logged_model(model.model_id, "READY")
        if not run.outputs or not run.outputs.model_outputs:
            self.client.log_outputs(source, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    def model_of(self, run: "Run", name: str) -> "LoggedModel":
        """The one model of the run, of those that repeated requests may have made."""
        where = [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
        found = self.client.search_logged_models(*where)
        if not found:
            self.client.create_logged_model(run.info.experiment_id, name, run.info.run_id, params=run.data.params)
            found = self.client.search_logged_models(*where)
        kept, *twins = sorted(found, key=lambda model: (model.status != "READY", model.model_id))
        for twin in twins:
            self.client.delete_logged_model(twin.model_id)
        return kept
