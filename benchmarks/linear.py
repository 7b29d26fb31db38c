"""One training step for 13 linear heads beside a step for one: the backbone's forward pass is shared."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Comparison, interleave
from pretrain.network.model import build_backbone
from transfer.evaluation.features import Extractor
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators.heads import HeadGrid

TITLE = "Linear probe, float32: a step of 13 learning rates beside a step of one"
RATES = (*(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 2, 5)), 0.1)

# architecture, images, px, classes; the first is the case with a target: 13 cost at most 1.3 times one
CASES = (("resnet50", 32, 224, 1000), ("resnet18", 128, 48, 10))
QUICK = (("resnet18", 8, 32, 10),)


def step(
    extractor: Extractor, rates: tuple[float, ...], images: int, px: int, classes: int
) -> Callable[[], object]:
    """Forward through the frozen backbone, then one step of each head."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, px, px), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, classes, (images,), generator=g).to(extractor.device)
    width = extractor(pixels[:1]).shape[1]
    heads = HeadGrid(width, classes, rates=rates, decays=(0.0,), device=extractor.device)
    return lambda: heads.step(extractor(pixels), labels, factor=1.0)


def measure(quick: bool) -> list[Comparison]:
    """Times in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparisons = []
    for number, (arch, images, px, classes) in enumerate(QUICK if quick else CASES):
        extractor = Extractor(build_backbone(arch).eval(), EvalTransform(size=px), device, "float32")
        times = interleave(
            {
                "one": step(extractor, RATES[-1:], images, px, classes),
                "all": step(extractor, RATES, images, px, classes),
            },
            repeats=3 if quick else 7,
        )  # fmt: skip
        comparisons.append(
            Comparison(
                case=f"{arch}, {images} images of {px} px, {classes} classes",
                reference=times["one"], ours=times["all"],
                target_speedup=1 / 1.3 if number == 0 and not quick else None,
            )
        )  # fmt: skip
    return comparisons
