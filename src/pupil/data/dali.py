"""Batches decoded, cropped and resized by NVIDIA DALI: on the GPU where there is one, else by its threads on the CPU.

DALI draws nothing: it is handed each image's bytes, its window and its flip, which are those of every other loader.  Pixels
of one size come out to the bit as elsewhere; decoded and resized images differ in rounding (README.md has the figures).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pupil.data.augment import moves
from pupil.data.batches import Batches, Views
from pupil.data.encoded import Encoded
from pupil.data.files import Pixels
from pupil.data.resized import centre, cuts
from pupil.data.workers import cores
from pupil.types import UserError

AHEAD = 2  # batches that are made while one is trained on
Inputs = dict[str, list[np.ndarray]]  # of each input of the pipeline an array per image


def installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class Dali(Batches):
    """Its images stay on disk."""

    pipeline: Any = None  # built when it is first needed

    def hold(self, images: Tensor | Pixels | Encoded) -> None:
        assert not isinstance(images, Tensor), "in memory already"
        if self.two_views:
            raise UserError("loader: dali makes one view of each image, and this method wants two; use auto or workers")
        self.images = images

    def views(self, number: int, plan: Sequence[Tensor]) -> Iterator[Views]:
        if self.pipeline is None:
            self.pipeline = pipeline(self.images, self.batch_size, self.device)
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for ids in plan:
                waiting.append(thread.submit(self.make, number, ids))
                if len(waiting) > AHEAD:
                    yield Views(waiting.popleft().result())
            while waiting:
                yield Views(waiting.popleft().result())

    def make(self, number: int, ids: Tensor) -> Tensor:
        given = self.inputs(number, ids)
        try:
            (found,) = self.pipeline.run(**given)
        except RuntimeError as e:
            why = (str(e).strip().splitlines() or ["it does not say why"])[0][:200]
            raise UserError(
                f"DALI failed in epoch {number} ({why}); run the same command: it goes on; loader=workers does without DALI"
            ) from None
        if self.device.type == "cuda":
            images = torch.from_dlpack(found.as_tensor()).clone()
            torch.cuda.current_stream(self.device).synchronize()  # before DALI writes there again
        else:
            images = torch.from_numpy(np.array(found.as_array()))
        return images if isinstance(self.images, Pixels) else images.permute(0, 3, 1, 2).contiguous()

    def inputs(self, number: int, ids: Tensor) -> Inputs:
        images = self.images
        if isinstance(images, Pixels):
            corners, flips = moves(self.augment, self.drawn, number, ids)
            found = {"images": images.read(ids).numpy(), "starts": (corners - self.augment.pad).to(torch.int32).numpy()}
            return {name: list(values) for name, values in found.items()} | {"flips": numbers(flips)}
        found = {"images": [np.frombuffer(raw, np.uint8) for raw in images.files(ids.tolist())]}
        if self.drawn is None:
            whole = torch.cat([torch.zeros(len(ids), 2, dtype=torch.int64), images.sizes[ids].flip(1)], 1)
            windows, flips = whole, torch.zeros(len(ids), dtype=torch.bool)
            regions = torch.tensor([centre(w, h, images.side) for w, h in images.sizes[ids].tolist()])
        else:
            windows, flips = cuts(images.sizes[ids], self.augment, self.drawn, number, ids)
            regions = torch.cat([torch.zeros(len(ids), 2), windows[:, 2:]], 1)
        places = {"starts": windows[:, :2].int(), "shapes": windows[:, 2:].int(), "from": regions[:, :2], "to": regions[:, 2:]}
        return found | {name: list(part.numpy()) for name, part in places.items()} | {"flips": numbers(flips)}


def numbers(flags: Tensor) -> list[np.ndarray]:
    return list(flags.to(torch.int32)[:, None].numpy())


def pipeline(images: Pixels | Encoded, batch_size: int, device: torch.device) -> Any:
    """Its output is (B, 3, S, S) for pixels and (B, S, S, 3) for encoded images, uint8."""
    from nvidia import dali
    from nvidia.dali.pipeline import Pipeline

    fn: Any = dali.fn
    gpu = device.type == "cuda"
    made = Pipeline(batch_size, cores(), (device.index or 0) if gpu else None, prefetch_queue_depth=1)
    side = images.shape[-1]
    with made:
        names = ("images", "starts", "flips") + (() if isinstance(images, Pixels) else ("shapes", "from", "to"))
        given = {name: fn.external_source(name=name) for name in names}
        if isinstance(images, Pixels):
            pixels = fn.reinterpret(given["images"].gpu() if gpu else given["images"], layout="CHW")
            window = {"shape": [side, side], "axis_names": "HW", "out_of_bounds_policy": "pad"}
            out = fn.slice(pixels, start=given["starts"], **window)
        else:
            window = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
            kind = "mixed" if gpu else "cpu"
            decoded = fn.decoders.image_slice(given["images"], given["starts"], given["shapes"], device=kind, **window)
            region = {"roi_start": given["from"], "roi_end": given["to"]}
            out = fn.resize(
                decoded, size=[side, side], interp_type=dali.types.DALIInterpType.INTERP_LINEAR, antialias=True, **region
            )
        made.set_outputs(fn.flip(out, horizontal=given["flips"]))
    made.build()
    return made
