"""Published image sets in the layout of their authors' archives, from the folder or archive that the user has.

Which image is whose is read from the set's own lists where it has them; a listed file that is missing is told like a
damaged one.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from pupil.data.base import Content, Data, Pool
from pupil.data.decode import as_pool
from pupil.data.folder import content_of, find_splits
from pupil.data.tree import Tree, lines_of, list_tree
from pupil.types import UserError

Listed = list[tuple[str, str]]  # file in the tree, name of its class
ANNOTATIONS = "val/val_annotations.txt"

WANTED = {
    "tiny_imagenet": "tiny-imagenet-200.zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip, or its folder "
    "(train/<wnid>/images/*.JPEG, val/images, val/val_annotations.txt)",
    "cub200": "CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158, or its folder "
    "(images/<class>/*.jpg, images.txt, image_class_labels.txt, train_test_split.txt)",
    "mit67": "a folder or .zip with Images/<class>/*.jpg, TrainImages.txt and TestImages.txt "
    "from https://web.mit.edu/torralba/www/indoor.html",
    "imagenet": "a folder with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG "
    "(ILSVRC2012 from https://image-net.org, the validation images sorted into class folders)",
}


def tiny_imagenet(config: Data) -> Content:
    """Classes are the sorted WordNet ids; `val` is the test split, as in the papers."""
    tree, where = find(config, "tiny_imagenet", ANNOTATIONS)
    classes, train, val = tiny_imagenet_lists(config, tree, where)
    return content(config, tree, classes, train, val)


def tiny_imagenet_cskd(config: Data) -> Content:
    """As CSKD halves `val`: of each class the first 25 of 50 validate, the others test; here in the order of their names."""
    tree, where = find(config, "tiny_imagenet", ANNOTATIONS)
    classes, train, val = tiny_imagenet_lists(config, tree, where)
    return halved(config, tree, classes, train, sorted(val))


def tiny_imagenet_cskd_glob(config: Data) -> Content:
    """The same halves in the order in which the file system lists `val/images`, which differs from machine to machine."""
    tree, where = find(config, "tiny_imagenet", ANNOTATIONS)
    classes, train, val = tiny_imagenet_lists(config, tree, where)
    if not tree.path.is_dir():
        raise UserError(
            f"data.path is {config.path!r}: {config.name} follows the order of a folder's listing, an archive has none; "
            "unpack it, or use tiny_imagenet_cskd, whose halves are the same everywhere"
        )
    listing = (tree.path / where / "val/images").iterdir()
    place = {f"{where}val/images/{path.name}": i for i, path in enumerate(listing)}
    return halved(config, tree, classes, train, sorted(val, key=lambda row: place.get(row[0], len(place))))


def halved(config: Data, tree: Tree, classes: Sequence[str], train: Listed, val: Listed) -> Content:
    """The first half of each class's `val` in the order given validates, what follows tests."""
    members: dict[str, Listed] = defaultdict(list)
    for row in val:
        members[row[1]].append(row)
    halves = [[row for rows in members.values() for row in rows[: len(rows) // 2]]]
    halves += [[row for rows in members.values() for row in rows[len(rows) // 2 :]]]
    found = content(config, tree, classes, train, halves[1])
    return found._replace(val=pool_of(config, tree, classes, halves[0]))


def tiny_imagenet_lists(config: Data, tree: Tree, where: str) -> tuple[list[str], Listed, Listed]:
    """Classes, training images, `val`."""
    start = len(f"{where}train/")
    train = [name for name in tree.files if name.startswith(f"{where}train/") and "/" in name[start:]]
    listed = [(name, name[start:].split("/")[0]) for name in train]
    rows = fields(config, [line.split()[:2] for line in lines_of(tree, where + ANNOTATIONS)])
    return sorted({wnid for _, wnid in listed}), listed, [(f"{where}val/images/{file}", wnid) for file, wnid in rows]


def cub200(config: Data) -> Content:
    texts = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    tree, where = find(config, "cub200", *texts)
    tables = [dict(fields(config, [x.split(maxsplit=1) for x in lines_of(tree, where + text)])) for text in texts]
    files, labels, in_train = tables
    if not files.keys() == labels.keys() == in_train.keys():
        raise UserError(f"{config.path}: {', '.join(texts)} name different images; fetch the set again")
    names = {labels[i].strip(): file.split("/")[0] for i, file in files.items()}
    if not all(label.isdigit() for label in names):
        raise UserError(f"{config.path}: {texts[1]} must number the classes; fetch the set again")
    train, test = (
        [
            (f"{where}images/{file.strip()}", names[labels[i].strip()])
            for i, file in files.items()
            if in_train[i].strip() == part
        ]
        for part in ("1", "0")
    )
    return content(config, tree, [names[label] for label in sorted(names, key=int)], train, test)


def mit67(config: Data) -> Content:
    """80 training and 20 test images of each class, by the authors' lists."""
    tree, where = find(config, "mit67", "TrainImages.txt", "TestImages.txt")
    train, test = (
        [(f"{where}Images/{line.strip()}", line.strip().split("/")[0]) for line in lines_of(tree, where + text)]
        for text in ("TrainImages.txt", "TestImages.txt")
    )
    return content(config, tree, sorted({name for _, name in train}), train, test)


def imagenet(config: Data) -> Content:
    """Class folders; `val` is the test split, as in the papers."""
    tree = list_tree("data.path", given(config, "imagenet"))
    splits = find_splits(tree)
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    if "test" not in splits:
        raise UserError(
            f"data.path is {config.path!r}, which has no train and val folders; imagenet needs {WANTED['imagenet']}"
        )
    return content_of(splits, config)


def given(config: Data, kind: str) -> str:
    if config.path is None:
        raise UserError(f"data.path is not given: {config.name} is not downloaded; get {WANTED[kind]}, and set data.path to it")
    return config.path


def find(config: Data, kind: str, *texts: str) -> tuple[Tree, str]:
    """The tree, and the folder in it that holds all `texts`: "" or with a slash at its end."""
    tree = list_tree("data.path", given(config, kind))
    known = set(tree.texts)
    homes = [name.removesuffix(texts[0]) for name in tree.texts if name == texts[0] or name.endswith("/" + texts[0])]
    for home in sorted(homes, key=len):
        if all(home + text in known for text in texts):
            return tree, home
    raise UserError(
        f"data.path is {config.path!r}, which does not hold {' and '.join(texts)}; {config.name} needs {WANTED[kind]}"
    )


def fields(config: Data, rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The two columns of a list."""
    short = next((row for row in rows if len(row) < 2), None)
    if short is not None:
        raise UserError(f"{config.path}: the line {' '.join(short)!r} of a list of {config.name} is cut; fetch the set again")
    return [(row[0], row[1]) for row in rows]


def content(config: Data, tree: Tree, classes: Sequence[str], train: Listed, test: Listed) -> Content:
    """Labels are positions in `classes`."""
    train_pool, test_pool = (pool_of(config, tree, classes, part) for part in (train, test))
    return Content(tuple(classes), train=train_pool, test=test_pool, fingerprint=tree.fingerprint)


def pool_of(config: Data, tree: Tree, classes: Sequence[str], part: Listed) -> Pool:
    index = {name: k for k, name in enumerate(classes)}
    for file, name in part:
        if name not in index:
            raise UserError(f"{config.path}: {file} is of class {name}, which has no training images; fetch the set again")
    labels = torch.tensor([index[name] for _, name in part], dtype=torch.int64)
    return as_pool(tree, [file for file, _ in part], labels, config)
