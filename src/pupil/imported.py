"""`teacher.checkpoint`, `student.checkpoint`: a teacher or a matched baseline that is imported instead of trained.

It leaves what a training leaves (model folder, record, test predictions), without epochs.  The file's outputs are taken
for the classes of the prepared data, in their order, and it sees the prepared data's pixels, mean and std.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pupil import checkpoint, distributed, figures, measures, published
from pupil.arrays import save_arrays
from pupil.assemble import Job, find, pattern, same_classes, single
from pupil.data import SOURCES, Prepared
from pupil.feeds import loaders, pick_device
from pupil.methods.alone import Alone
from pupil.models import NETWORKS, build
from pupil.models.taps import native_state
from pupil.net import Net
from pupil.opening import open_record
from pupil.places import PREDICTIONS, where
from pupil.record import read, sha256
from pupil.scoring import predict, snapshot
from pupil.settings import Settings
from pupil.types import UserError


class Import(NamedTuple):
    """A network from elsewhere."""

    net: Net
    origin: dict[str, str]  # layout and SHA-256, for model.json and the record
    meta: dict[str, Any]  # of a model folder: its model.json; of a file: empty
    told: list[str]  # what was matched and what was left out, for people
    data: str | None = None  # the data set that the file names


def run(settings: Settings, data: Prepared) -> None:
    """Import one network, and leave a model folder and a record folder."""
    distributed.refuse("an import")
    job, m = single(settings, data), data.manifest
    path = path_of(pattern(settings) or "", job.meta["network"], job.seed)
    with about(settings.train.role):
        found = load(find(path), job.meta["network"], len(m["classes"]), m["image_size"])
        if found.meta:
            same_classes(found.meta, data, find(path))
    job = renamed(job, found, path)
    told = [*found.told, *differences(found, m)]
    device = pick_device(settings.device)
    place = where(settings, job.stage)
    feeds = loaders(data, job.optim.batch_size, job.seed, device)
    record, stream = open_record(job, data, settings, place, device)
    record.attach("import.json", {"file": path, **found.origin, "told": told})
    print(*told, sep="\n", flush=True)
    final: dict[str, float] = {}
    outputs: dict[str, str] = {}
    status = "FAILED"
    try:
        logits, labels = predict(found.net.to(device), feeds.test)
        final = {f"test/{name}": value for name, value in measures.quality(logits, labels).items()}
        meta = {
            **job.meta,
            **checkpoint.seen(m),
            "data": {"name": m["name"], "digest": m["digest"]},
            "metrics": {**{name: final[name] for name in ("test/top1", "test/nll")}, "test/images": len(labels)},
        }
        checkpoint.save(place.out, snapshot(found.net), meta)
        save_arrays(place.out / PREDICTIONS, {"labels": labels, "deployed": logits})
        images = data.splits["test"][0]
        figures.draw_all(record.artifacts, [], measures.confusion(logits, labels), logits, labels, images, m["classes"])
        outputs = {name: sha256(place.out / name) for name in (checkpoint.WEIGHTS, PREDICTIONS)}
        status = "FINISHED"
    finally:
        record.finish(final, outputs, status)
        stream.close()
    print(f"{job.title}: test top-1 {final['test/top1']:.2f} %  ({place.out})", flush=True)


def renamed(job: Job, found: Import, path: str) -> Job:
    """The training that is not done, as an import."""
    own = {key: found.meta[key] for key in ("method", "surgery", "teacher") if key in found.meta}
    meta = {**job.meta, **own, "imported": found.origin, "epoch": None, "selection": None}
    params = {key: job.params[key] for key in ("role", "network", "seed")}
    params |= {"checkpoint": path, "imported": found.origin["layout"]}
    return job._replace(
        title=f"{job.title}, imported", method=Alone(found.net), meta=meta, params=params, imported=found.origin
    )


def path_of(pattern: str, network: str, seed: int) -> str:
    return str(Path(pattern).expanduser()).replace("{network}", network).replace("{seed}", str(seed))


@contextmanager
def about(role: str) -> Iterator[None]:
    """Says which setting a mistake is about."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{role}.checkpoint: {e}") from None


def load(path: Path, network: str, classes: int, size: int) -> Import:
    """A published file or one of our model folders, on the CPU in eval mode; `size`: of the images, in pixels."""
    if path.is_dir():
        net, meta = checkpoint.load(path)
        if meta["network"] != network:
            raise UserError(f"{path} holds a {meta['network']}, but the network asked for is {network}")
        return Import(net, {"layout": "model folder", "sha256": meta["sha256"]}, meta, [f"{path}: model folder; {network}"])
    found = published.read(path)
    net = build(network, classes, size)
    if network in NETWORKS:
        match = published.matched(path, found, network)
        native = net.state_dict()
    else:
        native = native_state(net)
        match = published.fit_native(found.state, network, net, classes)
        if match.wrong:
            raise UserError(f"{path}: its tensors are not those of {published.differs(match)}")
    if match.classes != classes:
        raise UserError(
            f"{path} has {match.classes} outputs, the prepared data {classes} classes;"
            " prepare the data that it knows (data.name, data.classes), or give another file"
        )
    with torch.no_grad():
        for key, value in published.weights(path, match).items():
            native[key].copy_(value)
    told = [*published.describe(path, found, network, match.counters), *published.left_out(found)]
    origin = {"layout": found.layout, "sha256": sha256(path)}
    return Import(net.eval().requires_grad_(False), origin, {}, told, found.data)


def differences(found: Import, manifest: Mapping[str, Any]) -> list[str]:
    """One line if the network was, as far as is known, trained with other pixels than it will see."""
    classes, name = len(manifest["classes"]), found.data
    known = {name: source.statistics for name, source in SOURCES.items() if source.statistics is not None}
    alike = [manifest["name"]] if manifest["name"] in known else [n for n in known if SOURCES[n].classes == classes]
    name = name if name in known else alike[0] if len(alike) == 1 else None
    sees = {key: manifest[key] for key in ("image_size", "mean", "std")}
    if found.meta:
        knew, source = {key: found.meta[key] for key in sees}, "its model.json says"
    elif name is not None:
        mean, std = known[name]
        knew, source = {"mean": mean, "std": std}, f"published for {name}"
    else:
        return []
    other = [key for key in knew if rounded(knew[key]) != rounded(sees[key])]
    text = "; ".join(f"{key} {rounded(sees[key])} of the prepared data, {rounded(knew[key])} {source}" for key in other)
    return [f"note: it sees {text}"] if other else []


def rounded(value: Any) -> Any:
    return value if isinstance(value, int) else [round(v, 3) for v in value]


def look(settings: Settings, teacher_classes: int, student_classes: int, size: int) -> Iterator[str]:
    """For `check`: reads every file that is to be imported, and says so if one has changed since it was."""
    teacher, student = settings.teacher.checkpoint, settings.student.checkpoint
    wanted = [("teacher", teacher, name, settings.teacher.seed, name) for name in settings.teachers if teacher]
    wanted += [
        ("student", student, name, seed, f"{name}/{seed}") for name in settings.students for seed in settings.seeds if student
    ]
    seen: dict[tuple[str, str, str], Import] = {}
    for role, text, network, seed, cell in wanted:
        path = path_of(text or "", network, seed)
        with about(role):
            if (role, network, path) not in seen:
                classes = teacher_classes if role == "teacher" else student_classes
                seen[role, network, path] = load(find(path), network, classes, size)
                yield f"{role} {network} is imported, not trained: {seen[role, network, path].told[0]}"
            record = find(f"out/records/{role}/{cell}")
            before = read(record) if (record / "record.json").exists() else {"params": {}, "inputs": {}}
            same = before["inputs"].get("checkpoint") == seen[role, network, path].origin["sha256"]
            if before["params"].get("checkpoint") == path and not same:
                raise UserError(f"{path} has changed since it was imported; run dvc repro --force --single-item train_{role}")
