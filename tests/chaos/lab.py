"""A clone in which trainings are started, killed and compared: prepared data, a teacher, and a process that starts stages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.pipeline.conftest import make_clone

CLASSES = 10
RESIZED = ("data.name=folder", "data.path=runs/images", "data.crop=resized", "prepared=runs/resized")
OPTIM = {"batch_size": 10, "lr": 0.02}


class Going:
    """A process that was started."""

    def __init__(self, folder: Path, command: subprocess.Popen[bytes] | None = None) -> None:
        """`folder`: where its output goes; `command`: unless the lab's starter has started it."""
        self.folder, self.command = folder, command

    @property
    def pid(self) -> int | None:
        if self.command is not None:
            return self.command.pid
        path = self.folder / "pid"
        return int(path.read_text()) if path.exists() else None

    @property
    def status(self) -> int | None:
        if self.command is not None:
            return self.command.poll()
        path = self.folder / "status"
        return int(path.read_text()) if path.exists() else None

    @property
    def said(self) -> str:
        path = self.folder / "out"
        return path.read_text() if path.exists() else ""

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        while (status := self.status) is None:
            assert time.monotonic() < end, f"it has not ended after {seconds} s\n{self.said}"
            time.sleep(0.005)
        return status


class Lab:
    """The clone, and how stages are started in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0
        self.clone = make_clone(root / "pupil")
        self.clone.edit({f"{part}.{key}": value for part in ("optim", "teacher.optim") for key, value in OPTIM.items()})
        self.path = self.clone.path
        self.starter: subprocess.Popen[bytes] | None = None
        self.run("prepare", "out=out/data", "record=out/records/prepare")
        self.run("train", "train.role=teacher", "train.network=resnet8", "out=out/models/teacher/resnet8",
                 "record=out/records/teacher/resnet8")  # fmt: skip

    def images(self) -> None:
        """Image files, and the data of random resized crops prepared of them."""
        g = torch.Generator().manual_seed(0)
        for name in range(CLASSES):
            (self.path / "runs/images" / str(name)).mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 256, (20, 24, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(self.path / f"runs/images/{name}/{i}.png")
        self.run("prepare", *RESIZED[:3], "out=runs/resized", "record=runs/resized_record")

    @property
    def resume(self) -> Path:
        return self.path / ".work" / "resume"

    def start(self, stage: str, *arguments: str, tracked: bool = False, anew: bool = False) -> Going:
        """`tracked`: with MLflow; `anew`: by a Python of its own, as a user does."""
        folder = self.folder()
        script = f"stages/{stage}.py"
        if anew:
            return Going(folder, self.popen(folder, [sys.executable, script, *arguments], tracked))
        if self.starter is None:
            zygote = Path(__file__).with_name("zygote.py")
            self.starter = subprocess.Popen(
                [sys.executable, str(zygote)], cwd=self.path, env=self.clone.environment(), stdin=subprocess.PIPE
            )
        assert self.starter.stdin is not None
        self.starter.stdin.write(json.dumps([script, arguments, str(folder), tracked]).encode() + b"\n")
        self.starter.stdin.flush()
        return Going(folder)

    def command(self, *command: str) -> Going:
        """Any command, as typed at a prompt."""
        folder = self.folder()
        return Going(folder, self.popen(folder, list(command)))

    def folder(self) -> Path:
        self.number += 1
        folder = self.root / f"process-{self.number}"
        folder.mkdir()
        return folder

    def popen(self, folder: Path, command: list[str], tracked: bool = True) -> subprocess.Popen[bytes]:
        """Leader of a process group of its own, as what is typed at a prompt."""
        hidden = {} if tracked else {"PYTHONPATH": f"{self.hiding()}{os.pathsep}{self.path / 'src'}"}
        with open(folder / "out", "ab") as out:
            return subprocess.Popen(
                command, cwd=self.path, env=self.clone.environment(**hidden), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def hiding(self) -> Path:
        """A folder that hides mlflow, whose import takes seconds."""
        folder = self.root / "hiding"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text("import sys\nsys.modules['mlflow'] = None\n")
        return folder

    def run(self, stage: str, *arguments: str, **more: Any) -> str:
        """Until it ends well; gives what it said."""
        going = self.start(stage, *arguments, **more)
        status = going.wait()
        assert status == 0, f"{stage} {' '.join(arguments)}: status {status}\n{going.said}"
        return going.said

    def close(self) -> None:
        if self.starter is not None:
            assert self.starter.stdin is not None
            self.starter.stdin.close()
            self.starter.wait(30)
