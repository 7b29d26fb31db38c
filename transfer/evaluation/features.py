"""Features of images by a frozen backbone, computed once and kept (`feature_cache.py` has the files).

Ranks share out the parts, a run that was cut off takes up what is there, and rank 0 joins them at the end.
Every rank must see the folder.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pretrain.common.collectives import any_rank, gather_objects
from pretrain.common.errors import UserError
from pretrain.common.machine import computes_bfloat16, cores_of_rank
from pretrain.common.process_group import barrier, is_main, rank, world_size
from pretrain.common.progress import Progress, counted
from pretrain.common.signals import StopSignals
from pretrain.data.datasets import ImageDataset
from pretrain.data.images import BrokenImage
from pretrain.data.workers import load
from pretrain.network.small_maps import multiply_small_maps
from transfer.checkpoints.backbone import Backbone, digest_of
from transfer.evaluation.feature_cache import FORMAT, Broken, FeatureFolder, mapped
from transfer.evaluation.pooled_features import LAST, network_of, widths_of
from transfer.evaluation.tokens import Positions, at_size, needs_other_positions
from transfer.evaluation.transforms import EvalTransform

logger = logging.getLogger(__name__)

TRIES = 3  # at making parts that turn out damaged or missing
MOST_NAMED = 20  # images in an error's one line
PIXELS = 256 * 224**2  # of a forward pass: larger images go in several, which bounds memory
AGREEMENT = 0.05  # of the features' spread: the largest mean error at which bfloat16 is used by itself


class Extractor:
    """A frozen backbone: 8-bit pixels B x 3 x H x W in, float32 features B x D out.

    It works on a copy in eval mode, in bfloat16 with BatchNorm folded into the convolutions. `stages` names
    those whose pooled outputs are the features, side by side (`widths` has each one's share of D). Without a
    model (raw pixels) the features are the normalised pixels, flattened; of a `grey` data set one channel.
    """

    def __init__(
        self,
        model: nn.Module | None,
        transform: EvalTransform,
        device: torch.device,
        precision: str,
        *,
        grey: bool = False,
        stages: tuple[str, ...] = LAST,
        positions: Positions = "bicubic antialias",
    ) -> None:
        self.grey, self.stages = grey, stages
        self.positions = positions if needs_other_positions(model, transform.size) else None
        self.transform, self.device, self.precision = transform, device, precision
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.module: nn.Module | None = None
        self.widths = {LAST[0]: (1 if grey else 3) * transform.size**2}
        if model is not None:
            model = at_size(model, transform.size, positions)
            self.widths = widths_of(model, stages, transform.size)
            model = network_of(model, stages)
            module = _folded(model) if self.dtype == torch.bfloat16 else copy.deepcopy(model).eval()
            self.module = multiply_small_maps(module).to(
                device, self.dtype, memory_format=torch.channels_last
            )  # type: ignore[call-overload]
            self.module.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels_B3HW: Tensor) -> Tensor:
        """B x 3 x H x W uint8 -> B x D float32 on the device, without gradient."""
        most = max(1, PIXELS // self.transform.size**2)
        if len(pixels_B3HW) > most and self.module is not None:
            return torch.cat([self(part) for part in pixels_B3HW.split(most)])
        return self.of_normalised(self.transform.normalise(pixels_B3HW.to(self.device, non_blocking=True)))

    @torch.no_grad()
    def of_normalised(self, x: Tensor) -> Tensor:
        """The same of images B x 3 x H x W that are normalised already."""
        x = x.to(self.device)
        if self.module is None:
            return (x[:, :1] if self.grey else x).flatten(1)
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.module(x).float()

    @property
    def width(self) -> int:
        """D, the number of features."""
        return sum(self.widths.values())

    def digest(self) -> str:
        """Of the frozen network, "" for raw pixels: the proof that nothing changed it."""
        return digest_of(self.module) if self.module is not None else ""


def _folded(model: nn.Module) -> nn.Module:
    """A copy with each BatchNorm folded into the convolution before it, where torch.fx can trace it."""
    from torch.fx.experimental.optimization import fuse

    model = copy.deepcopy(model).eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    try:
        return fuse(model)
    except Exception:  # untraceable: the unfolded copy computes the same
        return model


def make_extractor(
    backbone: Backbone,
    data: ImageDataset,
    transform: EvalTransform,
    device: torch.device,
    precision: Literal["auto", "float32", "bfloat16"],
    stages: tuple[str, ...] = LAST,
    *,
    positions: Positions | None = None,
    over_ranks: bool = True,
) -> Extractor:
    """The extractor in the precision asked for; `auto` tries bfloat16 on 128 images and compares.

    `auto` takes bfloat16 where it suits every rank: all must call, unless `over_ranks` is False.
    """
    if backbone.model is None:
        grey = data.pixels is not None and data.pixels.ndim == 3
        return Extractor(None, transform, device, "float32", grey=grey)
    how = positions or backbone.weights.get("positions", "bicubic antialias")
    looks: dict[str, Any] = {"stages": stages, "positions": how}
    exact = Extractor(backbone.model, transform, device, "float32", **looks)
    anywhere = partial(any_rank, device=device) if over_ranks else bool
    if precision == "float32" or (precision == "auto" and anywhere(not computes_bfloat16(device))):
        return exact
    fast = Extractor(backbone.model, transform, device, "bfloat16", **looks)
    if precision == "bfloat16":
        return fast
    picks = np.linspace(0, len(data) - 1, min(128, len(data)), dtype=int)
    ((pixels, _),) = image_batches(
        Decoded(data, transform), [picks], transform, 0, on_broken=lambda *_: None
    )  # those that cannot be read are told when their turn comes
    wanted, got = exact(pixels), fast(pixels)
    spread = (wanted - wanted.mean(0)).norm(dim=1).mean()
    error = (got - wanted).norm(dim=1).mean()
    return exact if anywhere(not float(error) <= AGREEMENT * float(spread)) else fast


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the images that could be read, N x D float32, memory-mapped read-only."""

    x_ND: np.ndarray
    positions_N: np.ndarray
    """Of each row's image in the data set, ascending as they were asked for."""
    broken: Broken
    """The images without a row."""
    split: str


def extract(
    extractor: Extractor,
    backbone: Backbone,
    data: ImageDataset,
    *,
    cache: Path,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    workers: int | None = None,
) -> np.ndarray:
    """Features of `data` (or of its images `indices`) in order, N x D float32, memory-mapped read-only.

    All ranks must call. Raises UserError for images that cannot be read, naming each, for features that are
    not finite, naming the image, and for a cache that some ranks do not see; Stopped after SIGTERM with the
    finished parts kept.
    """
    (found,) = extract_all(
        extractor, backbone, [(data, indices)], cache=cache, batch_size=batch_size, workers=workers
    )
    return found.x_ND


def extract_all(
    extractor: Extractor,
    backbone: Backbone,
    wanted: Sequence[tuple[ImageDataset, np.ndarray | None]],
    *,
    cache: Path,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Path | None = None,
    max_broken: int = 0,
) -> list[Features]:
    """`extract` for several data sets, or images of them, of which `max_broken` may be unreadable in all.

    All of them are gone through before more than those are refused, in one list; what was made is kept.
    """
    found = [
        _extract(extractor, backbone, data, indices, Path(cache), batch_size, workers, progress)
        for data, indices in wanted
    ]
    refuse_broken([message for features in found for message in features.broken.values()], max_broken)
    return found


def refuse_broken(messages: Sequence[str], most: int) -> None:
    """Tell of each image that cannot be read; raises UserError where there are more than `most`."""
    messages = sorted(set(messages))
    if is_main():
        for message in messages:
            logger.warning("%s", message)
    if len(messages) > most:
        names = ", ".join(m.partition(": ")[0] for m in messages[:MOST_NAMED])
        more = f" and {len(messages) - MOST_NAMED} more, all in the log" if len(messages) > MOST_NAMED else ""
        raise UserError(
            f"{counted(len(messages), 'image')} cannot be read and --max-broken-images "
            f"is {most}: {names}{more}; repair or remove them (the features of all others are kept), or "
            "allow them with that option: results then state how many were evaluated"
        )


def _extract(
    extractor: Extractor,
    backbone: Backbone,
    data: ImageDataset,
    indices: np.ndarray | None,
    cache: Path,
    batch_size: int,
    workers: int | None,
    progress: Path | None,
) -> Features:
    indices = np.arange(len(data)) if indices is None else np.asarray(indices)
    data.agree()
    meta: dict[str, Any] = {
        "format": FORMAT, "weights": backbone.key, "transform": extractor.transform.as_dict(),
        "precision": extractor.precision, "grey": extractor.grey,
    }  # fmt: skip
    if extractor.stages != LAST:
        meta["stages"] = list(extractor.stages)
    if extractor.positions is not None:
        meta["positions"] = extractor.positions
    # rank 0's view of the files is all ranks'
    there = gather_objects(FeatureFolder.of(cache, meta, data, indices) if is_main() else None)[0]
    with there.lock() if is_main() else contextlib.nullcontext():
        broken = gather_objects(there.broken(data) if is_main() else None)[0]
        for _ in range(TRIES):
            if broken is not None:
                break
            _write_parts(extractor, data, indices, there, batch_size, workers, progress)
            barrier()
            broken = gather_objects(there.join(data, extractor.width) if is_main() else None)[0]
    features = mapped(there.file)
    if broken is None or features is None:
        raise UserError(
            f"{there.file} is missing or incomplete here; --cache-dir must be a folder all ranks see"
        )
    readable = indices[~np.isin(indices, list(broken))] if broken else indices
    assert features.shape == (len(readable), extractor.width)
    return Features(x_ND=features, positions_N=readable, broken=broken, split=data.split)


def _write_parts(
    extractor: Extractor,
    data: ImageDataset,
    indices: np.ndarray,
    there: FeatureFolder,
    batch_size: int,
    workers: int | None,
    progress: Path | None,
) -> None:
    """Write the missing parts that are this rank's."""
    mine = [p for p in there.parts[rank() :: world_size()] if not p.file.exists()]
    if is_main():
        there.check_space(extractor.width)
    batches = [
        (part, start, indices[start : min(start + batch_size, part.stop)])
        for part in mine
        for start in range(part.start, part.stop, batch_size)
    ]
    broken: Broken = {}
    loader = image_batches(
        Decoded(data, extractor.transform), [b for *_, b in batches], extractor.transform, workers,
        on_broken=broken.__setitem__,
    )  # fmt: skip
    rows: list[np.ndarray] = []
    bar = Progress(
        sum(len(b) for *_, b in batches), label=f"features of {data.name} {data.split}", unit="image",
        file=progress if is_main() else None,
    )  # fmt: skip
    with StopSignals() as stop, bar:
        for (pixels, batch), (part, start, asked) in zip(loader, batches):
            if len(batch):
                features = extractor(pixels).cpu()
                if not bool(torch.isfinite(features).all()):
                    bad = int(batch[int((~torch.isfinite(features)).any(1).nonzero()[0])])
                    raise UserError(
                        f"the features of image {data.key(bad)} are not finite: the weights hold NaN or "
                        "infinity, or overflow in this precision (--precision float32)"
                    )
                rows.append(features.numpy())
            bar.update(len(asked))
            if start + len(asked) == part.stop:
                there.write_part(part, rows, broken, extractor.width)
                rows = []
                broken.clear()
            if stop.requested:
                stop.hand_over()


class Decoded(Dataset[Any]):
    """8-bit pixels by position, with the position."""

    def __init__(self, data: ImageDataset, transform: EvalTransform) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform.decode(self.data.image(int(index))), int(index)


class _Tolerant(Dataset[Any]):
    """The items of another data set, and in place of pixels the message of an image that cannot be read."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        try:
            return self.images[index]
        except BrokenImage as error:
            return str(error), int(index)


class _Collate:
    def __init__(self, transform: EvalTransform) -> None:
        self.transform = transform

    def __call__(self, items: list[tuple[Tensor | str, int]]) -> tuple[Tensor, np.ndarray, Broken]:
        good = [(pixels, i) for pixels, i in items if isinstance(pixels, Tensor)]
        side = self.transform.size
        pixels = (
            self.transform.square([pixels for pixels, _ in good])
            if good
            else torch.zeros(0, 3, side, side, dtype=torch.uint8)
        )
        broken = {i: message for message, i in items if isinstance(message, str)}
        return pixels, np.array([i for _, i in good], np.int64), broken


def image_batches(
    images: Dataset[Any],
    batches: Sequence[np.ndarray],
    transform: EvalTransform,
    workers: int | None,
    *,
    on_broken: Callable[[int, str], object] | None = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(pixels B x 3 x H x W uint8, positions B) in the order given.

    An image that cannot be read is left out of its batch and told to `on_broken`, with its position and why;
    without that, BrokenImage names the file.
    """
    if workers is None:
        small = transform.resize is None
        workers = 0 if small else min(8, cores_of_rank())
    loader = load(
        images if on_broken is None else _Tolerant(images), [b.tolist() for b in batches], workers=workers,
        collate=_Collate(transform), pin_memory=torch.cuda.is_available(),
        batch_bytes=3 * transform.size**2 * max(map(len, batches), default=0),
    )  # fmt: skip
    for pixels, positions, broken in loader:
        for position, message in broken.items():
            assert on_broken is not None
            on_broken(position, message)
        yield pixels, positions
