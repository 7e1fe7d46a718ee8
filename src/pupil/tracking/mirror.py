"""One record folder and its MLflow run."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupil import record
from pupil.tracking.store import COMPLETE, PIPELINE, RECORD, Store, find_runs, is_complete, locked

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run


Points = dict[tuple[str, int], set[str]]  # (key, step) -> values in the store, by repr: nan is nan


class Mirror:
    """One record folder and its run.  `push` may be called at any time, by any process, any number of times."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.run: str | None = None  # its id, once known
        self.lines = 0  # lines of metrics.jsonl in the store
        self.created = False  # by this object

    def push(self) -> bool:
        """Log what the store lacks; True if nothing more will come."""
        facts = record.read(self.folder)  # before the lines: a finished record gets no more of them
        finished = facts["status"] != "RUNNING"
        with locked(self.store.home, f"mlflow-{facts['uid']}") as lock:
            logged: Points = {}
            if self.run is None or finished:
                run = self.find_or_create(facts)
                self.run, self.lines = run.info.run_id, 0
                if is_complete(run):
                    return True
                self.describe(facts, run)
                logged = self.history(run)
            new = record.read_metrics(self.folder, self.lines)
            points = [p for line in new for p in metrics(line["values"], line["time"], line["step"])]
            self.log([p for p in points if (p.key, p.step) not in logged])
            self.lines += len(new)
            if finished:
                for p in points:
                    logged.setdefault((p.key, p.step), set()).add(repr(p.value))
                self.finish(facts, max((line["step"] for line in new), default=0), logged)
                lock.unlink(missing_ok=True)  # whoever waits for it finds a complete run
        return finished

    def find_or_create(self, facts: dict[str, Any]) -> "Run":
        found = find_runs(self.store, f"tags.`{RECORD}` = '{facts['uid']}'")
        if found:
            return found[0]
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
        return self.client.create_run(self.store.experiment, milliseconds(facts["started"]), tags, facts["name"])

    def parent(self, group: dict[str, str], started: float) -> str:
        """The run that stands for the group: one per key and store; that of `mlflow run` is adopted."""
        key = group["key"]
        with locked(self.store.home, "mlflow"):
            if found := find_runs(self.store, f"tags.`{PIPELINE}` = '{key}'", deleted=False):
                return found[0].info.run_id
            if key.startswith("mlflow-") and (run := self.existing(key.removeprefix("mlflow-"))):
                self.client.set_tag(run, PIPELINE, key)
                return run
            run = self.client.create_run(self.store.experiment, milliseconds(started), {PIPELINE: key}, group["name"])
            self.client.set_terminated(run.info.run_id, "FINISHED")
            return run.info.run_id

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
            self.client.log_batch(run.info.run_id, params=chunk)
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
        assert self.run
        for chunk in chunks(points, 1000):
            self.client.log_batch(self.run, metrics=chunk)

    def finish(self, facts: dict[str, Any], step: int, logged: Points) -> None:
        """Everything that is known at the end only; the tag that says so comes last."""
        assert self.run
        run = self.client.get_run(self.run)
        model = self.log_model(run, (self.folder / facts["model"]).resolve(), step) if facts.get("model") else None
        final = metrics(facts.get("final") or {}, facts["ended"], step, model)
        self.log([p for p in final if repr(p.value) not in logged.get((p.key, step), ())])
        if facts.get("model") and not model and facts["status"] == "FINISHED":
            self.client.set_tag(self.run, "pupil.model", "missing")
        if any((self.folder / "artifacts").rglob("*")):
            self.client.log_artifacts(self.run, str(self.folder / "artifacts"))
        self.client.log_artifact(self.run, str(self.folder / "record.json"))
        self.client.set_terminated(self.run, facts["status"], milliseconds(facts["ended"]))
        self.client.set_tag(self.run, COMPLETE, "true")

    def log_model(self, run: "Run", folder: Path, step: int) -> str | None:
        """The deployed network as an MLflow model, and its id; mlflow.log_model would need an active run."""
        from mlflow.entities import LoggedModelOutput

        from pupil import checkpoint, serve

        if not (folder / checkpoint.META).exists():
            return None
        meta = checkpoint.read_meta(folder)
        experiment, source = run.info.experiment_id, run.info.run_id
        found = self.client.search_logged_models([experiment], f"source_run_id = '{source}'")
        name = "teacher" if meta.get("role") in ("teacher", "shkd") else "student"
        model = found[0] if found else self.client.create_logged_model(experiment, name, source, params=run.data.params)
        if model.status != "READY":
            with tempfile.TemporaryDirectory() as scratch:
                saved = serve.save(folder, meta, Path(scratch), source, model)
                self.client.log_model_artifacts(model.model_id, str(saved))
            self.client.finalize_logged_model(model.model_id, "READY")
        if not run.outputs or not run.outputs.model_outputs:
            self.client.log_outputs(source, [LoggedModelOutput(model.model_id, step)])
        return model.model_id


def metrics(values: dict[str, Any], at: float, step: int, model: str | None = None) -> list["Metric"]:
    from mlflow.entities import Metric

    numbers = {plain(key): float(value) for key, value in values.items() if isinstance(value, int | float)}
    return [Metric(key, value, milliseconds(at), step, model_id=model) for key, value in numbers.items()]


def plain(name: str) -> str:
    """A name MLflow accepts."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]


def limited(value: Any) -> str:
    """Parameters are cut at 6000 characters by MLflow; a cut value would look like the value."""
    text = str(value)
    if len(text) <= 6000:
        return text
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}: see record.json"


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
