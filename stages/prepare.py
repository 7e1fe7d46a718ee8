"""prepare: a data set -> few large files and a manifest, in `out`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pupil.config import launch
from pupil.data import prepare
from pupil.session import where_prepared
from pupil.settings import Settings


def main(settings: Settings) -> None:
    settings.refuse_unused("data")
    out = where_prepared(settings)
    manifest = prepare(settings.data, out)
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(
        f"{manifest['name']}: {len(manifest['classes'])} classes, {counts} images of {manifest['image_size']} pixels in {out}; "
        f"report.txt and contact_sheet.png there show them"
    )
    if manifest["dropped"]:
        print(f"{manifest['dropped']} images could not be read and were left out; report.txt lists them")


if __name__ == "__main__":
    launch(main)
