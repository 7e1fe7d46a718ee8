"""Two nodes, as two torchrun commands that meet over TCP, each with a working folder of its own: the numbers of one process."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pupil import record
from pupil.config import ROOT
from tests.test_distributed import PAGE, stage

WORDS = (*PAGE, "train.role=student", "optim.epochs=2", "optim.lr=1e-6", "prepared=data", "out=model", "record=record")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def node(number: int, folder: Path, port: int, *words: str) -> subprocess.Popen[str]:
    """The command of docs/many_machines.md, with 127.0.0.1 for the first node."""
    meet = ("--nnodes=2", f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    env |= {"OMP_NUM_THREADS": "1", "DVC_ROOT": str(folder)}
    command = [sys.executable, "-m", "torch.distributed.run", *meet, str(ROOT / "stages" / "train.py"), *words]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_nodes_train_as_one_process(tmp_path: Path) -> None:
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    alone.mkdir()
    done = stage(alone, "prepare", *PAGE[:3], "out=data", "record=prepared")
    assert not done.returncode, done.stderr
    for folder in (first, second):
        shutil.copytree(alone / "data", folder / "data")
    done = stage(alone, "train", *WORDS)
    assert not done.returncode, done.stderr
    port = free_port()
    nodes = [node(k, folder, port, *WORDS) for k, folder in enumerate((first, second))]
    said = [each.communicate(timeout=300) for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], said
    assert [out.count("test top-1") for out, _ in said] == [1, 0], "the first process alone speaks"
    assert sorted(path.name for path in second.iterdir()) == ["data"], "and writes"
    assert record.read(first / "record")["environment"]["device"] == "2 processes, cpu"
    for a, b in zip(*(record.read_metrics(folder / "record") for folder in (alone, first)), strict=True):
        for key in ("train/loss", "val/nll"):
            assert b["values"][key] == pytest.approx(a["values"][key], rel=1e-5)
        assert b["values"]["val/top1"] == a["values"]["val/top1"]
