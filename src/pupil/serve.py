"""The deployed network behind MLflow's pyfunc interface: code and safetensors, no pickle.

MLflow runs this file whenever it loads the model ("models from code"), with a copy of this package beside it.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel
from mlflow.types import Schema, TensorSpec

from pupil import checkpoint

REQUIRED = ("torch", "safetensors", "numpy")  # and mlflow, which adds itself


class Student(PythonModel):
    """Raw pixels in, logits out."""

    def load_context(self, context: Any) -> None:
        self.net, self.meta = checkpoint.load(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:  # type: ignore[override]
        """(B, 3, H, W) uint8 -> (B, K) float32."""
        mean, std = (torch.tensor(self.meta[key]).view(3, 1, 1) for key in ("mean", "std"))
        images = torch.from_numpy(np.array(model_input)).float() / 255
        with torch.no_grad():
            return self.net((images - mean) / std).float().numpy()


def save(folder: Path, meta: dict[str, Any], scratch: Path, run: str, model: LoggedModel) -> Path:
    """A folder with this file, this package and the weights; signature and requirements are given, MLflow infers nothing."""
    deployed, package, size = scratch / "deployed", Path(__file__).parent, meta["image_size"]
    deployed.mkdir()
    for name in (checkpoint.WEIGHTS, checkpoint.META):
        shutil.copy(folder / name, deployed)
    inputs = Schema([TensorSpec(np.dtype("uint8"), (-1, 3, size, size))])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, len(meta["classes"])))])
    mlflow.pyfunc.save_model(
        scratch / "model",
        python_model=str(Path(__file__)),
        code_paths=[str(package)],
        artifacts={"model": str(deployed)},
        signature=ModelSignature(inputs, outputs),
        input_example=np.arange(2 * 3 * size * size).reshape(2, 3, size, size).astype(np.uint8),
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIRED],
        mlflow_model=Model(model.artifact_location, run, model_id=model.model_id, model_uuid=model.model_id),
    )
    for cache in list(scratch.rglob("__pycache__")):
        shutil.rmtree(cache)
    return scratch / "model"


set_model(Student())
