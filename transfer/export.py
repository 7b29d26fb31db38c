"""Export a checkpoint's backbone as another library's files, proved by loading them there.

Each target is read back by the library that it is named after and must compute the same features; otherwise
nothing is left in the output folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint import FORMAT, size_of, write_safetensors
from pretrain.common.errors import UserError
from pretrain.common.files import set_usual_mode, sha256_of, write_json, write_text
from pretrain.common.output_folder import need_space, output_folder
from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from transfer.checkpoints.backbone import Backbone, load_backbone
from transfer.options.commands import parse
from transfer.options.weights import ExportSettings, WeightsOptions

RECORD = "export.json"
TOLERANCE = 1e-5
"""Largest difference of features, relative to the largest feature; the same kernels run in the same order."""


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write, prove, then move into place; returns what export.json records."""
    with output_folder(settings.output, "transfer export", earlier=lambda f: (f / RECORD).exists()):
        return _export(settings)


def _export(settings: ExportSettings) -> dict[str, Any]:
    loaded = load_backbone(settings.weights, settings)
    if loaded.stem is None and settings.format in ("torchvision", "detectron2"):
        raise UserError(
            f"{settings.weights} is a {loaded.arch}: {settings.format} gets ResNets alone; timm and "
            "huggingface take it"
        )
    if "without" in loaded.weights.get("options", {}):
        raise UserError(
            f"{settings.weights} is a {loaded.arch} without its {loaded.weights['options']['without']}, "
            "which timm cannot build; evaluate the file here"
        )
    if loaded.stem not in ("imagenet", None):
        raise UserError(
            f"{settings.weights} has a {loaded.stem} stem, of which {settings.format} has no counterpart: "
            "its ResNets begin with a 7x7 convolution and max pooling (a CIFAR stem has a 3x3 one and none). "
            "Evaluate the file here with knn or linear, or pretrain with --stem imagenet"
        )
    parent = settings.output.parent
    need_space(parent, size_of(loaded.network().state_dict()), "the weights")
    with tempfile.TemporaryDirectory(prefix=f".{settings.output.name}.", dir=parent) as aside:
        folder = Path(aside)
        writers = {"timm": _timm, "torchvision": _torchvision, "detectron2": _detectron2, "huggingface": _hub}
        difference, how = writers[settings.format](loaded, settings, folder)
        record = {
            "format": settings.format,
            "weights": str(settings.weights),
            "sha256": loaded.sha256,
            "source_format": loaded.format,
            "branch": loaded.branch,
            "arch": loaded.arch,
            "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
            "largest_relative_difference": difference,
            "load_with": how,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")},
        }
        for path in folder.iterdir():
            if path.is_file():
                set_usual_mode(path)
            shutil.move(path, settings.output / path.name)
        write_json(settings.output / RECORD, record)
    return record


# ------------------------------------------------------------------ writers: (difference, how to load it)


def _timm(loaded: Backbone, settings: ExportSettings, folder: Path) -> tuple[float, str]:
    import timm

    path = folder / f"{loaded.arch}.safetensors"
    write_safetensors(path, _state(loaded), _metadata(loaded))
    options = loaded.weights.get("options", {})
    model = timm.create_model(str(loaded.arch), num_classes=0, checkpoint_path=str(path), **options)
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return (
        _difference(loaded, model),
        f'timm.create_model("{loaded.arch}", num_classes=0, '
        f'checkpoint_path="{settings.output / path.name}"{more})',
    )


def _torchvision(loaded: Backbone, settings: ExportSettings, folder: Path) -> tuple[float, str]:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if loaded.arch not in known:
        near = ", ".join(name for name in known if "resne" in name)
        raise UserError(f"torchvision has no {loaded.arch}; it has {near}. timm and huggingface take it")
    path = folder / f"{loaded.arch}.pth"
    torch.save(_state(loaded), path)
    model = torchvision.models.get_model(loaded.arch)
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return (
        _difference(loaded, model),
        f"model = torchvision.models.{loaded.arch}(); model.fc = torch.nn.Identity(); "
        f'model.load_state_dict(torch.load("{settings.output / path.name}"))',
    )


def _detectron2(loaded: Backbone, settings: ExportSettings, folder: Path) -> tuple[float, str]:
    from transfer.conversion.convert import ConvertSettings, convert

    path = folder / "backbone.pkl"
    origin = convert(
        ConvertSettings(
            weights=settings.weights,
            output=path,
            **{f.name: getattr(settings, f.name) for f in dataclasses.fields(WeightsOptions)},
        )
    )
    return (
        float(origin["difference"]),
        f"python -m transfer.train_net --config-file ... MODEL.WEIGHTS {settings.output / path.name}",
    )


def _hub(loaded: Backbone, settings: ExportSettings, folder: Path) -> tuple[float, str]:
    import timm

    # transformers reads only files whose metadata say "pt"
    write_safetensors(folder / "model.safetensors", _state(loaded), {**_metadata(loaded), "format": "pt"})
    options = dict(loaded.weights.get("options", {}))
    pool = options.pop("global_pool", getattr(loaded.network(), "global_pool", "avg"))
    write_json(folder / "config.json", {
        "architecture": loaded.arch, "num_classes": 0, "num_features": loaded.network().num_features,
        "global_pool": pool if isinstance(pool, str) else "avg", "pretrained_cfg": preprocessing(loaded),
        **({"model_args": options} if options else {}),
    })  # fmt: skip
    difference = _difference(loaded, timm.create_model(f"local-dir:{folder}", pretrained=True))
    write_text(folder / "README.md", model_card(loaded, settings))
    return difference, f'timm.create_model("local-dir:{settings.output}", pretrained=True)'


def _state(loaded: Backbone) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in loaded.network().state_dict().items()}


def _metadata(loaded: Backbone) -> dict[str, str]:
    """This project's own, so that the file can be judged here again and still says where it came from."""
    found = {"source": loaded.format, **loaded.metadata}
    found |= {
        "format": FORMAT,
        "arch": str(loaded.arch),
        "branch": loaded.branch,
    }
    if loaded.stem is not None:
        found["stem"] = loaded.stem
    heads = loaded.weights.get("options", {}).get("num_heads")
    found |= {"heads": str(heads)} if heads else {}
    found |= {"positions": loaded.weights["positions"]} if "positions" in loaded.weights else {}
    return found | {"origin": Path(loaded.path).name, "origin_sha256": loaded.sha256}


@torch.inference_mode()
def _difference(loaded: Backbone, model: nn.Module) -> float:
    """Largest difference of features on noise, relative to the largest; RuntimeError over TOLERANCE."""
    embedding = getattr(loaded.network(), "patch_embed", None)
    side = getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", False) else None
    size = tuple(side) if side else (96, 96)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    wanted, got = loaded.network()(images), model.eval()(images)
    difference = float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported model computes other features: they differ by {difference:.2g}")
    return difference


# ------------------------------------------------------------------ the hub's folder


def preprocessing(loaded: Backbone) -> dict[str, Any]:
    """How timm is to prepare images: as the weights' own metadata say, else as ImageNet's evaluation."""
    said = loaded.metadata
    size = int(said.get("image_size", 224))

    def numbers(key: str, default: tuple[float, ...]) -> list[float]:
        return [float(x) for x in said[key].split(",")] if key in said else list(default)

    return {
        "num_classes": 0, "input_size": [3, size, size], "pool_size": None, "fixed_input_size": False,
        "mean": numbers("mean", IMAGENET_MEAN), "std": numbers("std", IMAGENET_STD),
        "interpolation": "bilinear", "crop_pct": 0.875 if size >= 160 else 1.0,
        **({"first_conv": "conv1", "classifier": "fc"} if loaded.stem else {}),
    }  # fmt: skip


def model_card(loaded: Backbone, settings: ExportSettings) -> str:
    """README.md of the folder: what it is, where it comes from, how to load it, what it scores."""
    source = loaded.metadata.get("source", "self-supervised pretraining")
    rows = {
        "Architecture": f"{loaded.arch} (timm), without classifier, {loaded.network().num_features} features",
        "Weights": source,
        "Converted from": f"`{Path(loaded.path).name}`, format: {loaded.format}, {loaded.branch} branch",
        "SHA-256 of that file": f"`{loaded.sha256}`",
    }
    pretraining = {
        key: loaded.metadata[key] for key in ("dataset", "epochs", "seed") if key in loaded.metadata
    }
    if pretraining:
        rows["Pretraining"] = ", ".join(f"{key} {value}" for key, value in pretraining.items())
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- self-supervised
- timm
---
# {Path(loaded.path).stem} ({loaded.arch})

| | |
| --- | --- |
{facts}

## Use

```python
import timm

model = timm.create_model("local-dir:PATH_TO_THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

The exported folder was loaded this way and computes the same features as the original file.

## Results

{_results(loaded, settings.results)}
"""


def _results(loaded: Backbone, folder: Path | None) -> str:
    """The report's table of the results of exactly these weights."""
    if folder is None:
        return "None recorded here; `python -m transfer knn` and `linear` measure them."
    from transfer.report.evidence.collect import collect
    from transfer.report.evidence.grouping import SPECTRUM, group
    from transfer.report.pages.statements import verdict
    from transfer.report.pages.tables import to_markdown

    def of_these(weights: dict[str, Any]) -> bool:
        return (weights.get("sha256"), weights.get("branch", "online")) == (loaded.sha256, loaded.branch)

    evidence = collect([folder])
    evidence.records = [r for r in evidence.records if of_these(r["weights"] or {}) and r["task"] != SPECTRUM]
    if not evidence.records:
        raise UserError(
            f"--results {folder}: no result there is of these weights (sha256 {loaded.sha256[:12]}, "
            f"{loaded.branch} branch); evaluate this file first, or leave --results out"
        )
    return to_markdown(verdict(group(evidence)))


def main(argv: list[str]) -> int:
    """`python -m transfer export`."""
    settings: ExportSettings = parse("export", argv)
    record = export(settings)
    print(f"{settings.output}: {', '.join(record['files'])}")
    print(f"loaded in {settings.format}: features differ by {record['largest_relative_difference']:.1e}")
    print(f"load it with: {record['load_with']}")
    return 0
