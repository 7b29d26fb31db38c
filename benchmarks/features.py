"""Frozen features: our extraction beside a plain loop of the same model over the same images."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness import Comparison, Step, Table, interleave
from benchmarks.images import photographs, small_labelled
from pretrain.data.datasets import ImageDataset
from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from pretrain.network.model import build_backbone
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.features import Extractor, extract, make_extractor
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.evaluators.nearest import nearest

TITLE = (
    "Feature extraction beside a plain float32 loop: from image files to features on disk, on a GPU from "
    "decoded pixels"
)
TARGET = 1.5
GPU_IMAGES = 4096  # of a call: those of the case again and again
K = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the images it sees."""

    arch: str
    images: ImageDataset
    indices: np.ndarray
    transform: EvalTransform
    batch: int
    workers: int

    def backbone(self) -> Backbone:
        """Random weights from a seed: neither time nor agreement asks for trained ones."""
        torch.manual_seed(0)
        model = build_backbone(self.arch, zero_init_last=False).eval()
        weights = {"path": "random", "sha256": "random", "format": "random", "branch": "online"}
        return Backbone(model=model, arch=self.arch, weights=weights, metadata={})


class Plain(Dataset[Tensor]):
    """What ImageFolder with torchvision's transforms gives."""

    def __init__(self, case: Case) -> None:
        size, resize = case.transform.size, case.transform.resize
        squeeze = transforms.Resize((size, size) if resize is None else resize)
        self.case = case
        self.transform = transforms.Compose([
            squeeze, transforms.CenterCrop(size), transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.case.indices)

    def __getitem__(self, place: int) -> Tensor:
        return self.transform(self.case.images.image(int(self.case.indices[place])))


@torch.no_grad()
def plain_loop(case: Case, model: nn.Module, device: torch.device) -> Tensor:
    """A DataLoader, the model as it is in float32, the features put together."""
    loader = DataLoader(Plain(case), case.batch, num_workers=case.workers)
    return torch.cat([model(pixels.to(device)).cpu() for pixels in loader])


def ours(case: Case, backbone: Backbone, by: Extractor) -> Tensor:
    """As an evaluation calls it, nothing kept from before; both have their model at hand."""
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
        made = extract(
            by, backbone, case.images, cache=Path(cache), indices=case.indices, batch_size=case.batch,
            workers=case.workers,
        )  # fmt: skip
        return torch.from_numpy(np.array(made))


def decoded(case: Case, count: int) -> list[Tensor]:
    """Batches of 8-bit pixels, pinned where there is a GPU: the case's images again and again to `count`."""
    images = (case.images.image(int(i)) for i in case.indices)
    pixels_N3HW = case.transform.square([case.transform.decode(image) for image in images])
    batches = [pixels_N3HW[rows] for rows in (torch.arange(count) % len(pixels_N3HW)).split(case.batch)]
    return [b.pin_memory() for b in batches] if torch.cuda.is_available() else batches


@torch.no_grad()
def plain_from_pixels(batches: list[Tensor], model: nn.Module, device: torch.device) -> Tensor:
    """As `plain_loop` once the images are decoded."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.cat(
        [model((b.to(device, non_blocking=True).float() / 255 - mean) / std).cpu() for b in batches]
    )


def ours_from_pixels(batches: list[Tensor], by: Extractor) -> Tensor:
    """As `transfer.evaluation.features` does once the images are decoded."""
    return torch.cat([by(b).cpu() for b in batches])


def extractor(case: Case, backbone: Backbone, device: torch.device, precision: str) -> Extractor:
    return make_extractor(backbone, case.images, case.transform, device, precision)  # type: ignore[arg-type]


_folder = functools.cache(tempfile.TemporaryDirectory)  # of the images, until the process ends


@functools.cache
def cases(quick: bool) -> list[Case]:
    """Photographs cropped to 224 px by a ResNet-50; small images as they are by a ResNet-18."""
    folder = Path(_folder().name)
    gpu = torch.cuda.is_available()
    photos = photographs(folder, 16 if quick else 128 if gpu else 48)
    crop = EvalTransform(size=64, resize=72) if quick else EvalTransform(size=224, resize=256)
    found = [
        Case(
            arch="resnet18" if quick else "resnet50", images=photos, indices=np.arange(len(photos)),
            transform=crop, batch=256 if gpu else 16, workers=0 if quick else 2,
        )
    ]  # fmt: skip
    count = 160 if quick else 2000
    small = small_labelled(folder, per_class=count // 10)
    if small is not None:
        picks = np.linspace(0, len(small) - 1, count, dtype=int)
        whole = EvalTransform(size=small.native_size or 32)
        found.append(
            Case(arch="resnet18", images=small, indices=picks, transform=whole, batch=256, workers=0)
        )
    return found


def measure(quick: bool) -> list[Comparison]:
    """In the precision that `auto` chooses, and in float32 for what the rest brings.

    A few cores decode slower than a GPU computes: there both start from pixels, or decoding alone would show.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    comparisons = []
    for case in cases(quick):
        backbone = case.backbone()
        assert backbone.model is not None
        model = backbone.model.to(device)
        chosen = extractor(case, backbone, device, "auto").precision
        count = (256 if quick else GPU_IMAGES) if on_gpu else len(case.indices)
        batches = decoded(case, count) if on_gpu else []
        steps: dict[str, Step] = {
            "plain": partial(plain_from_pixels, batches, model, device)
            if on_gpu
            else partial(plain_loop, case, model, device)
        }
        for name in dict.fromkeys((chosen, "float32")):
            by = extractor(case, backbone, device, name)
            steps[name] = (
                partial(ours_from_pixels, batches, by) if on_gpu else partial(ours, case, backbone, by)
            )
        times = interleave(steps, repeats=2 if quick else 3, warm_up=1)
        for name in list(steps)[1:]:
            # In float32 both compute with the same kernels: the target is for what the device offers.
            aimed = not quick and name == "bfloat16"
            comparisons.append(
                Comparison(
                    case=f"{case.arch}, {count} of {case.images.name}, {case.transform.size} px, {name}, "
                    f"{device.type}{' from decoded pixels' if on_gpu else ''}",
                    reference=times["plain"], ours=times[name], target_speedup=TARGET if aimed else None,
                    note=f"{count / times[name].median_s:.0f} images a second"
                    + (", chosen by auto" if name == chosen else ""),
                )
            )  # fmt: skip
    return comparisons


def tables(quick: bool) -> list[Table]:
    """What the speed costs: k-NN by each precision's features beside that by plain float32's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = cases(quick)[-1]
    if len(case.images.classes) < 2:
        return []
    backbone = case.backbone()
    assert backbone.model is not None
    labels = torch.from_numpy(case.images.labels_N[case.indices])
    wanted = plain_loop(case, backbone.model.to(device), device)
    rows = [agreement("plain float32", wanted, wanted, labels)]
    for precision in ("float32", "auto"):
        made = extractor(case, backbone, device, precision)
        name = f"ours, {precision} ({made.precision})" if precision == "auto" else f"ours, {precision}"
        rows.append(agreement(name, ours(case, backbone, made), wanted, labels))
    return [
        Table(
            title=f"Agreement of the features with plain float32 ones: {case.arch} (random weights), "
            f"{len(labels)} of {case.images.name}, {device.type}",
            columns=("features", f"top-1 %, k = {K}", "same nearest neighbour %", "mean error / spread"),
            rows=rows,
            note="The first four fifths of the images are the bank, the others ask. Random weights' features "
            "lie close together, which makes agreement harder than trained ones do.",
        )
    ]


def agreement(name: str, features: Tensor, wanted: Tensor, labels: Tensor) -> list[str | float]:
    """Accuracy, share of queries whose nearest neighbour is that by `wanted`, error over the spread."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    bank, asked = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    top1 = knn_evaluate(features[bank], labels[bank], features[asked], labels[asked], ks=(K,))[f"top1_k{K}"]
    cpu = torch.device("cpu")
    near = [nearest(f[bank], f[asked], 1, metric="cosine", device=cpu)[1] for f in (features, wanted)]
    same = 100 * (near[0] == near[1]).double().mean()
    spread = (wanted - wanted.mean(0)).norm(dim=1).mean()
    return [name, top1, float(same), float((features - wanted).norm(dim=1).mean() / spread)]
