"""The six-crop recipe on one core: ours beside torchvision and Pillow written plainly."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from benchmarks.deviation import deviations
from benchmarks.harness import Comparison, Step, Table, Timing, interleave
from benchmarks.images import natural_images
from pretrain.data.datasets import ImageDataset
from pretrain.views.augment import View
from pretrain.views.loader import Views

TITLE = (
    "Decoding and augmenting: six published crops of a 500 x 375 JPEG, beside torchvision on Pillow images"
)
SIZES = (224, 224, 192, 160, 128, 96)
MIN_SCALES = (0.2, 0.2, 0.171, 0.143, 0.114, 0.086)
MAX_SCALES = (1.0, 1.0, 0.857, 0.714, 0.571, 0.429)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def plain_transforms() -> list[transforms.Compose]:
    """One transform a view, as the published code writes it."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))

    return [
        transforms.Compose([
            transforms.RandomResizedCrop(
                size, scale=(low, high), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomApply([ImageOps.solarize], p=0.1),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ])
        for size, low, high in zip(SIZES, MIN_SCALES, MAX_SCALES)
    ]  # fmt: skip


def plain(images: ImageDataset, views: list[transforms.Compose]) -> list[torch.Tensor]:
    """All views of all images, as ImageFolder and default collation make them."""
    made = []
    for i in range(len(images)):
        with Image.open(images.root / images.key(i)) as file:
            image = file.convert("RGB")
        made.append([view(image) for view in views])
    return [torch.stack(v) for v in zip(*made)]


def six_views(images: ImageDataset, *, finish_here: bool) -> Views:
    """Ours, finished here or left as uint8 crops for a device."""
    views = [
        View(size=size, min_scale=low, max_scale=high)
        for size, low, high in zip(SIZES, MIN_SCALES, MAX_SCALES)
    ]
    return Views(images, views, seed=0, mean=MEAN, std=STD, finish_here=finish_here)


def measure(quick: bool) -> list[Comparison]:
    """One core; the CPU's part when a device does the colour, and everything on the CPU."""
    count, repeats = (8, 2) if quick else (32, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = natural_images(Path(folder), count)
        pairs = [(0, i) for i in range(count)]
        steps: dict[str, Step] = {
            "plain": functools.partial(plain, images, plain_transforms()),
            "crops": functools.partial(six_views(images, finish_here=False).__getitems__, pairs),
            "all": functools.partial(six_views(images, finish_here=True).__getitems__, pairs),
        }
        times = interleave(steps, repeats=repeats, warm_up=1)
    torch.set_num_threads(threads)
    cases = (("the CPU's part, colour on a device", "crops", 5.0), ("everything on the CPU", "all", 1.5))
    return [
        Comparison(
            case=case, reference=times["plain"], ours=times[name], target_speedup=target,
            note=f"{_ms(times[name], count)} ms an image, plain {_ms(times['plain'], count)}",
        )
        for case, name, target in cases
    ]  # fmt: skip


def tables(quick: bool) -> list[Table]:
    """That what is fast is also right."""
    return [deviations(quick)]


def _ms(timing: Timing, count: int) -> str:
    return f"{1000 * timing.median_s / count:.1f}"
