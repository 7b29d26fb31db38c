"""Conversion to detectron2 with its proof, beside what any conversion must do: write the tensors."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import timm
import torch

from benchmarks.harness import Comparison, Step, interleave
from transfer.conversion.convert import ConvertSettings, convert

TITLE = "Conversion to detectron2: torch.save of the backbone (reference) beside converting it and proving it"
ARCHS = ("resnet18", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d")


def measure(quick: bool) -> list[Comparison]:
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS[:1] if quick else ARCHS:
            source, target = Path(folder) / f"{arch}.pth", Path(folder) / f"{arch}.pkl"
            state = timm.create_model(arch, num_classes=0).state_dict()
            torch.save(state, source)
            for verify in (False, True):
                settings = ConvertSettings(weights=source, output=target, arch=arch, verify=verify)
                steps: dict[str, Step] = {
                    "reference": partial(torch.save, state, source),
                    "ours": partial(convert, settings),
                }
                times = interleave(steps, repeats=3, warm_up=1)
                comparisons.append(
                    Comparison(
                        case=f"{arch}, {'proved' if verify else 'not proved'}",
                        reference=times["reference"],
                        ours=times["ours"],
                    )
                )
    return comparisons
