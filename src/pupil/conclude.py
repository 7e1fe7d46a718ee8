"""The end of a training: save what is deployed, read the test split, once, and draw."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pupil import checkpoint, figures, measures
from pupil.arrays import save_arrays
from pupil.assemble import Job
from pupil.data import Prepared
from pupil.feeds import Loaders
from pupil.fit import Trained
from pupil.places import PREDICTIONS, Where
from pupil.record import Record, read_metrics
from pupil.scoring import predict, score_answers
from pupil.settings import Settings


def conclude(
    job: Job, trained: Trained, data: Prepared, feeds: Loaders, settings: Settings, place: Where, record: Record
) -> dict[str, float]:
    """Save what is deployed; read the test split, once; draw.  Gives the run's final metrics."""
    net, deploy = job.method.student, settings.protocol.deploy
    candidates = {"last": trained.last, "best_by_val": trained.best_by_val}
    logits, labels = predict_each(net, candidates, feeds)
    chosen = logits[deploy]
    final = {f"test/{name}": value for name, value in measures.quality(chosen, labels).items()}
    final |= {f"test/{name}/top1": measures.quality(z, labels)["top1"] for name, z in logits.items()}
    net.load_state_dict(candidates[deploy])
    final |= {f"test/{name}/top1": top1 for name, top1 in score_answers(job.method, feeds.test).items()}
    if trained.best_on_test is not None:
        final["papers_protocol/best_on_test/top1"] = trained.best_on_test
    last_epoch = read_metrics(record.folder)[-1]["step"]
    meta = {
        **job.meta,
        **checkpoint.seen(data.manifest),
        "data": {"name": data.manifest["name"], "digest": data.manifest["digest"]},
        "selection": deploy,
        "epoch": last_epoch if deploy == "last" else trained.best_epoch,
        "metrics": {**{name: final[name] for name in ("test/top1", "test/nll")}, "test/images": len(labels)},
    }
    final["best_by_val/epoch"] = trained.best_epoch
    checkpoint.save(place.out, candidates[deploy], meta)
    arrays = {"labels": labels, "deployed": chosen.clone(), **logits}
    if job.teacher is not None and "cut" in job.meta["teacher"]:  # its own training left the answers of all its outputs
        arrays["teacher"], _ = predict(job.teacher, feeds.test)
        final["test/teacher/top1"] = measures.quality(arrays["teacher"], labels)["top1"]
    save_arrays(place.out / PREDICTIONS, arrays)
    table = measures.confusion(chosen, labels)
    names = data.manifest["classes"]
    images, observed = data.splits["test"][0], job.method.observed()
    shown = (images, names, observed, job.method.pictures(), data.splits["train"])
    figures.draw_all(record.artifacts, read_metrics(record.folder), table, chosen, labels, *shown)
    return final


def predict_each(
    net: torch.nn.Module, candidates: Mapping[str, Mapping[str, Tensor]], feeds: Loaders
) -> tuple[dict[str, Tensor], Tensor]:
    """Test logits of several sets of weights; equal sets are run once."""
    logits: dict[str, Tensor] = {}
    labels = feeds.test.labels.cpu()
    for name, state in candidates.items():
        twin = next((n for n in logits if all(torch.equal(state[k], candidates[n][k]) for k in state)), None)
        if twin is None:
            net.load_state_dict(state)
            logits[name], labels = predict(net, feeds.test)
        else:
            logits[name] = logits[twin].clone()
    return logits, labels
