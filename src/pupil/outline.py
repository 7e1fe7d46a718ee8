"""What can be known of the data before they are prepared, and what is known once they are."""

from typing import NamedTuple

from pupil import estimate
from pupil.assemble import find, outputs
from pupil.data import SOURCES, Data, load
from pupil.data.classes import class_sets
from pupil.settings import Settings, plain
from pupil.types import UserError


class Outline(NamedTuple):
    """What can be known of the data before it is prepared."""

    classes: int
    teacher_classes: int
    apart: bool  # whether the teachers have classes of their own
    kept: list[int] | None  # where the students' are among these, if they are
    image_size: int
    images: dict[str, int]  # of train, val and test
    about: str

    @property
    def training_images(self) -> int:
        return self.images["train"]


def outline_of(settings: Settings) -> Outline:
    """From the prepared data if it is there, else from the source, without downloading anything."""
    config, source = settings.data, SOURCES[settings.data.name]
    content = source.load(config) if source.classes is None else None  # lists the files, reads none
    folder = find(settings.prepared)
    if (folder / "manifest.json").exists():
        m = load(folder).manifest
        if m["config"] == plain(config):
            if content is not None and m.get("fingerprint") != content.fingerprint:
                raise UserError(
                    f"the images in {config.path} have changed since they were prepared; run dvc repro --force prepare"
                )
            theirs, apart = m["teacher_classes"] or m["classes"], bool(m["teacher_classes"])
            kept = outputs(theirs, m.get("unmerged", m["classes"])) if apart else None
            about = f"{len(m['classes'])} classes{beside(len(theirs), apart, kept)}"
            text = f"data: {m['name']}, {about}, {m['counts']} images of {m['image_size']} pixels, prepared"
            return Outline(len(m["classes"]), len(theirs), apart, kept, m["image_size"], m["counts"], text)
    names = tuple(str(k) for k in range(source.classes or 0)) if content is None else content.classes
    lists = [given for given in (config.classes, config.teacher_classes) if isinstance(given, tuple)]
    if content is None and any(isinstance(name, str) for given in lists for name in given):
        classes = how_many(config.classes, len(names))  # the names are known when the data are there
        apart = config.teacher_classes is not None
        theirs = how_many(config.teacher_classes, len(names)) if apart else classes
        kept = guess(config, theirs, classes) if apart else None
    else:
        sets = class_sets(config, names)
        classes, theirs, apart = len(sets.student), len(sets.teacher), sets.apart
        kept = outputs(sets.teacher, sets.student) if apart else None
    images = estimate.counts(config, content, classes, classes / max(1, len(names)))
    about = f"{classes} classes{beside(theirs, apart, kept)}"
    text = f"data: {config.name}, {about}, {images} images of {config.image_size} pixels; not prepared yet"
    return Outline(classes, theirs, apart, kept, config.image_size, images, text)


def how_many(given: int | str | tuple[int | str, ...] | None, of: int) -> int:
    return len(given) if isinstance(given, tuple) else given if isinstance(given, int) else of


def guess(config: Data, theirs: int, classes: int) -> list[int] | None:
    """`Outline.kept` before the names are known; where that leaves it open, as if the students' were there."""
    ours, given = config.classes, config.teacher_classes
    if isinstance(ours, tuple) and isinstance(given, tuple) and len({type(name) for name in (*ours, *given)}) == 1:
        return outputs(given, ours)
    return list(range(classes)) if classes <= theirs else None


def beside(classes: int, apart: bool, kept: list[int] | None) -> str:
    return f" (teachers: {classes} {'of their own' if kept is None else 'and these among them'})" if apart else ""
