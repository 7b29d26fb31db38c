"""Features of a frozen backbone, computed once and kept in a file.

The folder `cache/<key>/` holds features.npy (N x D float32, memory-mapped by its readers) and meta.json. The
key is a hash of weights, branch, images, transform and precision, so what changed is never taken from an old
file. While it is being made, parts of PART images each lie beside it: ranks share them out, a run that was
cut off takes up what is there, and rank 0 joins them at the end. Every rank must see the folder.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain.common.collectives import any_rank
from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, write_json
from pretrain.common.machine import cores_of_rank
from pretrain.common.process_group import barrier, is_main, rank, world_size
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.data.datasets import BrokenImage, ImageDataset
from pretrain.data.loader import set_up_worker
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.pooled_features import LAST, Stages, widths_of
from transfer.evaluation.transforms import EvalTransform

PART = 4096  # images
AGREEMENT = 0.05  # of the features' spread: the largest mean error at which bfloat16 is used by itself
FORMAT = 1


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
    ) -> None:
        self.grey, self.stages = grey, stages
        self.transform, self.device, self.precision = transform, device, precision
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.module: nn.Module | None = None
        self.widths = {LAST[0]: (1 if grey else 3) * transform.size**2}
        if model is not None:
            self.widths = widths_of(model, stages, transform.size)
            model = model if stages == LAST else Stages(model, stages)
            module = _folded(model) if self.dtype == torch.bfloat16 else copy.deepcopy(model).eval()
            self.module = module.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.module.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels_B3HW: Tensor) -> Tensor:
        x = self.transform.normalise(pixels_B3HW.to(self.device, non_blocking=True))
        if self.module is None:
            return (x[:, :1] if self.grey else x).flatten(1)
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.module(x).float()

    @property
    def width(self) -> int:
        """D, the number of features."""
        return sum(self.widths.values())

    def digest(self) -> str:
        """SHA-256 of every parameter and buffer: the proof that nothing changed them."""
        total = hashlib.sha256()
        for name, value in self.module.state_dict().items() if self.module is not None else ():
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def _folded(model: nn.Module) -> nn.Module:
    """A copy with each BatchNorm folded into the convolution before it, where torch.fx can trace it."""
    from torch.fx.experimental.optimization import fuse

    model = copy.deepcopy(model).eval()
    try:
        return fuse(model)
    except Exception:  # untraceable: the unfolded copy computes the same
        return model


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(names.get("avx512_bf16") or names.get("amx_bf16") or names.get("bf16"))


def make_extractor(
    backbone: Backbone,
    data: ImageDataset,
    transform: EvalTransform,
    device: torch.device,
    precision: Literal["auto", "float32", "bfloat16"],
    stages: tuple[str, ...] = LAST,
    *,
    over_ranks: bool = True,
) -> Extractor:
    """The extractor in the precision asked for; `auto` tries bfloat16 on 128 images and compares.

    `auto` takes bfloat16 where it suits every rank: all must call, unless `over_ranks` is False.
    """
    if backbone.model is None:
        grey = data.pixels is not None and data.pixels.ndim == 3
        return Extractor(None, transform, device, "float32", grey=grey)
    exact = Extractor(backbone.model, transform, device, "float32", stages=stages)
    anywhere = partial(any_rank, device=device) if over_ranks else bool
    if precision == "float32" or (precision == "auto" and anywhere(not computes_bfloat16(device))):
        return exact
    fast = Extractor(backbone.model, transform, device, "bfloat16", stages=stages)
    if precision == "bfloat16":
        return fast
    picks = np.linspace(0, len(data) - 1, min(128, len(data)), dtype=int)
    pixels = transform.square([transform.decode(data.image(int(i))) for i in picks])
    wanted, got = exact(pixels), fast(pixels)
    spread = (wanted - wanted.mean(0)).norm(dim=1).mean()
    error = (got - wanted).norm(dim=1).mean()
    return exact if anywhere(not float(error) <= AGREEMENT * float(spread)) else fast


def extract(
    extractor: Extractor,
    backbone: Backbone,
    data: ImageDataset,
    *,
    cache: Path,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Path | None = None,
) -> np.ndarray:
    """Features of `data` (or of its images `indices`) in order, N x D float32, memory-mapped read-only.

    All ranks must call. Raises UserError for features that are not finite, naming the image, and for a cache
    that some ranks do not see; Stopped after SIGTERM with the finished parts kept.
    """
    indices = np.arange(len(data)) if indices is None else np.asarray(indices)
    meta = {
        "format": FORMAT, "weights": backbone.key, "dataset": data.name, "split": data.split,
        "data": data.fingerprint, "transform": extractor.transform.as_dict(),
        "precision": extractor.precision, "grey": extractor.grey, "n": len(indices),
        "indices": hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest(),
    }  # fmt: skip
    if extractor.stages != LAST:
        meta["stages"] = list(extractor.stages)
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache) / key
    done = folder / "features.npy"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) if is_main() else contextlib.nullcontext():
        if not any_rank(is_main() and (folder / "meta.json").exists()):  # rank 0, which has the lock, decides
            _write_parts(extractor, data, indices, folder, batch_size, workers, progress)
            barrier()
            if is_main():
                _join(folder, done, len(indices))
                write_json(folder / "meta.json", meta)
        barrier()
    try:
        features = np.load(done, mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{done} is missing here; --cache-dir must be a folder all ranks see") from error
    assert features.shape[0] == len(indices)
    return features


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time makes the same features; a second waits and finds them made."""
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(OSError):  # file systems without locks: parts are written atomically anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.npy"


def _write_parts(
    extractor: Extractor,
    data: ImageDataset,
    indices: np.ndarray,
    folder: Path,
    batch_size: int,
    workers: int | None,
    progress: Path | None,
) -> None:
    """Write the missing parts that are this rank's."""
    parts = range(-(-len(indices) // PART))
    mine = [p for p in parts if p % world_size() == rank() and not _part(folder, p).exists()]
    batches = [
        indices[start : min(start + batch_size, (p + 1) * PART, len(indices))]
        for p in mine
        for start in range(p * PART, min((p + 1) * PART, len(indices)), batch_size)
    ]
    loader = image_batches(Decoded(data, extractor.transform), batches, extractor.transform, workers)
    total = sum(len(b) for b in batches)
    left = iter(mine)
    rows: list[np.ndarray] = []
    bar = Progress(
        total,
        label=f"features of {data.name} {data.split}",
        unit="image",
        file=progress if is_main() else None,
    )
    with StopSignals() as stop, bar:
        for pixels, batch in loader:
            features = extractor(pixels).cpu()
            if not bool(torch.isfinite(features).all()):
                bad = int(batch[int((~torch.isfinite(features)).any(1).nonzero()[0])])
                raise UserError(
                    f"the features of image {data.key(bad)} are not finite: the weights hold NaN or "
                    "infinity, or overflow in this precision (--precision float32)"
                )
            rows.append(features.numpy())
            bar.update(len(batch))
            if sum(map(len, rows)) == PART or bar.done == total:
                with atomic_path(_part(folder, next(left))) as aside, open(aside, "wb") as file:
                    np.save(file, np.concatenate(rows))
                rows = []
            if stop.requested:
                stop.hand_over()


def _join(folder: Path, done: Path, n: int) -> None:
    """All parts in order into one file, then without them."""
    parts = [_part(folder, p) for p in range(-(-n // PART))]
    lost = [p.name for p in parts if not p.exists()]
    if lost:
        raise UserError(
            f"{folder}: {', '.join(lost[:3])} missing; --cache-dir must be a folder all ranks see"
        )
    width = np.load(parts[0], mmap_mode="r").shape[1]
    with atomic_path(done) as aside:
        out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(n, width))
        for number, part in enumerate(parts):
            out[number * PART : (number + 1) * PART] = np.load(part)
        out.flush()
        del out
    for part in parts:
        part.unlink()


class Decoded(Dataset[Any]):
    """8-bit pixels by position, with the position."""

    def __init__(self, data: ImageDataset, transform: EvalTransform) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform.decode(self.data.image(int(index))), int(index)


class _Collate:
    def __init__(self, transform: EvalTransform) -> None:
        self.transform = transform

    def __call__(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, np.ndarray]:
        return self.transform.square([pixels for pixels, _ in items]), np.array([i for _, i in items])


def image_batches(
    images: Dataset[Any], batches: Sequence[np.ndarray], transform: EvalTransform, workers: int | None
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(pixels B x 3 x H x W uint8, positions B) in the order given. Raises BrokenImage naming the file."""
    if workers is None:
        small = transform.resize is None
        workers = 0 if small else min(8, cores_of_rank())
    loader: DataLoader[Any] = DataLoader(
        images, batch_sampler=[b.tolist() for b in batches], collate_fn=_Collate(transform),  # type: ignore[arg-type]
        num_workers=workers, pin_memory=torch.cuda.is_available(), worker_init_fn=set_up_worker,
    )  # fmt: skip
    try:
        yield from loader
    except BrokenImage as error:
        text = str(error).rpartition("BrokenImage: ")[2].strip()  # a worker's has its traceback as text
        error.__traceback__ = None  # a cycle with the loader in it, which would be closed late and slowly
    else:
        return
    raise BrokenImage(text)
