"""`python -m pupil import`: a published checkpoint becomes a model folder, ready to teach (distill.checkpoint=FOLDER).

`teacher.checkpoint` and `student.checkpoint` do it within the pipeline (`imported`); here are the options beside.

A file holds no class names and no pixel statistics.  --data says where they come from: the folder of prepared data
gives names, image size, mean and std (the user says by it that the network's outputs are these classes, in this
order); the name of a data set gives its published size, mean and std.  Without it they are those of the one data set
that has published ones and as many classes.  Names that nobody gave are "0" to "K-1".
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pupil import checkpoint
from pupil.assemble import find
from pupil.config import HOME
from pupil.data import SOURCES, load
from pupil.jsonfile import read_json
from pupil.methods.base import Setup
from pupil.methods.simkd import SimKD
from pupil.models import build
from pupil.net import probe
from pupil.places import empty_or_new, fresh
from pupil.published import COUNTER, Published, choose, describe, left_out, part_of, read, weights
from pupil.record import sha256
from pupil.remix import remix
from pupil.types import UserError
from pupil.untrusted import clip


class Facts(NamedTuple):
    """What a model folder says of the data."""

    about: str  # where they come from
    classes: list[str] | None
    image_size: int
    mean: list[float]
    std: list[float]
    data: dict[str, Any]


def adopt(
    file: Path,
    arch: str | None,
    data: str | None,
    classes: Path | None,
    teacher: str | None,
    out: Path | None,
    part: str | None = None,
    mix: float | None = None,
    image_size: int | None = None,
) -> None:
    """Reads, matches, writes; prints what it matched and what it left out."""
    if image_size is not None and image_size < 8:
        raise UserError(f"--image-size: expected 8 or more pixels, got {image_size}")
    if mix is not None and find(str(file)).is_dir():
        given = {"--arch": arch, "--data": data, "--classes": classes, "--part": part, "--image-size": image_size}
        if unused := [option for option, value in given.items() if value is not None]:
            raise UserError(f"{file} is a model folder, which says all but --mix: leave out {', '.join(unused)}")
        remix(find(str(file)), mix, teacher, out)
        return
    folder = fresh("import") / "model" if out is None else out
    empty_or_new(folder)
    found = read(file) if part is None else part_of(file, read(file), part)
    match = choose(file, found, arch)
    lender = None if teacher is None else find(teacher)
    if lender is not None and "proj" not in found.beside:
        raise UserError(f"--teacher lends its classifier to a SimKD student; {file} has no projector `proj`: leave it out")
    facts = facts_of(match.classes, data) if lender is None else facts_of_teacher(lender, data)
    facts = facts if image_size is None else facts._replace(image_size=image_size)
    names = class_names(match.classes if lender is None else len(facts.classes or ()), facts, classes)
    imported = {"layout": found.layout, "sha256": sha256(file)}
    meta: dict[str, Any] = {"network": match.network, "role": "teacher", "method": None, "surgery": {}, "teacher": None}
    state = weights(file, match)
    if lender is not None:
        state, changes = simkd(file, found, match.network, state, lender, facts.image_size)
        meta |= changes
    if mix is not None:
        state, changes = two_heads(file, found, state, mix)
        meta |= changes
    meta |= {"classes": names, "image_size": facts.image_size, "mean": facts.mean, "std": facts.std, "data": facts.data}
    checkpoint.save(folder, state, {**meta, "imported": imported, "epoch": None, "selection": None})
    print(*describe(file, found, match.network, match.counters), sep="\n")
    print_left_out(found, lender, mix)
    print(f"{len(names)} classes, {clip(names[0])} to {clip(names[-1])}; {facts.about}")
    if facts.classes is None and classes is None:
        print("the classes are only numbered: to teach with prepared data, import with --data and their folder, or --classes")
    inside = folder.resolve().is_relative_to(HOME.resolve())
    print(f"use it: distill.checkpoint={os.path.relpath(folder, HOME) if inside else folder.resolve()}")


def facts_of(classes: int, data: str | None) -> Facts:
    """By --data, else of the one data set with published statistics and as many classes."""
    if data is not None and (find(data) / "manifest.json").exists():
        m = load(find(data)).manifest
        if len(m["classes"]) != classes:
            raise UserError(f"--data {data} has {len(m['classes'])} classes, the network {classes}: prepare the data it knows")
        about = f"names, {m['image_size']} pixels, mean and std of the prepared data in {data}"
        return facts_in(m, about, {key: m[key] for key in ("name", "digest")})
    known = [name for name, source in SOURCES.items() if source.statistics is not None]
    if data is not None and data not in known:
        raise UserError(f"--data: expected the folder of prepared data, or one of {', '.join(known)}; got {data!r}")
    alike = [name for name in known if SOURCES[name].classes == classes]
    if data is None and len(alike) != 1:
        several = "more than one data set has" if alike else "no data set of the table has"
        raise UserError(
            f"{several} the network's {classes} classes; give --data and the folder of prepared data (names, image size, mean,"
            f" std), or the name of a data set with published ones: {', '.join(alike or known)}"
        )
    name = data or alike[0]
    mean, std = SOURCES[name].statistics or ((), ())
    size = SOURCES[name].size or 32
    about = f"{size} pixels, mean {mean} and std {std}, published for {name}" + ("" if data else f" (it has {classes} classes)")
    return Facts(about, None, size, list(mean), list(std), {"name": name, "digest": None})


def facts_of_teacher(folder: Path, data: str | None) -> Facts:
    """A SimKD student answers with its teacher's classifier, so the teacher's folder says what is known."""
    meta = checkpoint.read_meta(folder)
    if data is not None:
        return facts_of(len(meta["classes"]), data)
    about = f"names, {meta['image_size']} pixels, mean and std of the teacher in {folder}"
    return facts_in(meta, about, meta.get("data") or {"name": None, "digest": None})


def facts_in(found: Mapping[str, Any], about: str, data: dict[str, Any]) -> Facts:
    return Facts(about, found["classes"], found["image_size"], found["mean"], found["std"], data)


def class_names(classes: int, facts: Facts, file: Path | None) -> list[str]:
    """A JSON list, or an object with `classes` (a model.json, a manifest.json)."""
    if file is None:
        return facts.classes or [str(k) for k in range(classes)]
    try:
        given = read_json(file)
    except (OSError, ValueError) as e:
        raise UserError(f"--classes {file}: expected a JSON file ({clip(e)})") from None
    names = given.get("classes") if isinstance(given, dict) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--classes {file}: expected a JSON list of names, or an object whose `classes` is one")
    if len(names) != classes or len(set(names)) != classes:
        raise UserError(f"--classes {file}: expected {classes} different names, got {len(names)}, {len(set(names))} different")
    return names


State = dict[str, torch.Tensor]


def simkd(file: Path, found: Published, network: str, state: State, lender: Path, size: int) -> tuple[State, dict[str, Any]]:
    """The encoder, the projector and the teacher's classifier as one network; its state dict and its metadata."""
    teacher, lent = checkpoint.load(lender)
    net = build(network, len(state["head.weight"]))
    net.load_state_dict(state)
    projector = found.beside["proj"]
    try:
        c_out, mid = projector["transfer.6.weight"].shape[:2]
        setup = Setup(net, teacher, probe(net, size), probe(teacher, size), torch.zeros(0, dtype=torch.int64))
        surgery = SimKD.plan(setup, SimKD.Config(factor=c_out // mid))
        net = SimKD.deployed(net, **surgery)
        first = len(list(net.neck.children())) - 9  # the projector is the last nine layers
        state = net.state_dict()
        needed = {key for key in state if key.startswith("neck.") and not key.endswith(COUNTER)}
        for key, value in projector.items():
            module, i, name = key.split(".")
            if module != "transfer":
                raise ValueError(f"{clip(key)} is left over")
            state[f"neck.{int(i) + first}.{name}"] = value.detach().float()
            needed.discard(f"neck.{int(i) + first}.{name}")
        if needed:
            raise ValueError(f"{len(needed)} tensors are missing")
        state |= {f"head.{name}": value for name, value in teacher.head.state_dict().items()}
        net.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, ZeroDivisionError) as e:
        said = clip(str(e).splitlines()[-1])
        raise UserError(
            f"{file}: its projector does not fit {network} and the {lent['network']} in {lender} ({said})"
        ) from None
    ancestor = {"network": lent["network"], "role": lent.get("role"), "sha256": lent["sha256"]}
    return net.state_dict(), {"method": "simkd", "surgery": surgery, "teacher": ancestor}


def two_heads(file: Path, found: Published, state: State, mix: float) -> tuple[State, dict[str, Any]]:
    """TH-KD's student with its own classifier and the teacher's, `t_head`; its state dict and its metadata."""
    head, own = found.beside.get("t_head", {}), state["head.weight"]
    if not 0 < mix <= 1:
        raise UserError(f"--mix: expected the share of the teacher's classifier, above 0 and at most 1, got {mix}")
    if {key: tuple(value.shape) for key, value in head.items()} != {"weight": tuple(own.shape), "bias": (len(own),)}:
        said = f"its `t_head` is not {tuple(own.shape)} with a bias" if head else "it has no `t_head`"
        raise UserError(f"--mix is for HeadSharingKD's students, {file} is none ({said}): leave it out")
    state |= {f"teacher_head.{key}": value.detach().float().contiguous() for key, value in head.items()}
    return state, {"method": "thkd", "surgery": {"mix": mix, "width": own.shape[1], "classes": len(own)}}


def print_left_out(found: Published, lender: Path | None, mix: float | None) -> None:
    if lender is not None:
        print(f"SimKD: encoder, projector and the classifier of {lender}; the student's own classifier is left out")
    if mix is not None:
        print(f"TH-KD: both classifiers answer, the teacher's `t_head` with a share of {mix}")
    for line in left_out(found, {"proj"} if lender is not None else {"t_head"} if mix is not None else set()):
        print(line)
