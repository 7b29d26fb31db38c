"""Images that lie on the device: the loader's crops, from memory."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.common.errors import UserError
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.images import BrokenImage
from pretrain.input_pipeline import InputPipeline
from pretrain.settings import Settings
from pretrain.views import resident
from pretrain.views.batch import moved
from tests.helpers.training import tiny

CPU = torch.device("cpu")


@pytest.fixture
def photographs(coco_mini: Path, tmp_path: Path) -> ImageDataset:
    """Of several sizes, one of them no image."""
    folder = tmp_path / "train" / "scenes"
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted((coco_mini / "images").iterdir())[:24]):
        with Image.open(path) as image:
            image.resize((60 + 3 * i, 90 - 2 * i)).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes(b"no image")
    return open_dataset("imagefolder", tmp_path, "train")


def settings_of(photographs: ImageDataset, tmp_path: Path, **changes: object) -> Settings:
    of_folder = {"dataset": "imagefolder", "view_sizes": [32, 24], "batch_global": 8, "workers": 0}
    return tiny(photographs.root.parent, tmp_path, trade_off=0.1, **(of_folder | changes))


def test_the_views_are_the_loaders(photographs: ImageDataset, tmp_path: Path) -> None:
    found = []
    for where in ("host", "device"):
        settings = settings_of(photographs, tmp_path, data_on=where, jitter_p=[0.0], solarise_p=[0.0])
        pipeline = InputPipeline.of(settings, photographs, CPU)
        made = list(pipeline.batches(1, 6))
        found.append([pipeline.finished(moved(batch, CPU)) for batch in made])
        broken = [said for batch in made for said in batch.broken]
        assert broken and all("05.png" in said for said in broken)
    for host, device in zip(*found, strict=True):
        for a, b, size in zip(host, device, (32, 24), strict=True):
            assert a.shape == b.shape == (8, 3, size, size)
            level = (a - b).abs() * torch.tensor(settings.std)[:, None, None] * 255
            assert level.max() < 2.01 and level.mean() < 0.1


def test_a_compiler_makes_the_same_views_and_one_graph_for_those_of_a_size(
    photographs: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As traced; without colours, for which a CPU has ways that no compiler follows."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    never = {name: [0.0] for name in ("jitter_p", "grey_p", "blur_p", "solarise_p", "flip_p")}
    settings = settings_of(photographs, tmp_path, data_on="device", view_sizes=[24, 24], **never)
    pipeline = InputPipeline.of(settings, photographs, CPU)
    (batch,) = pipeline.batches(0, 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in ("compiled_graph", "graph"):
        for view, wanted in zip(pipeline.views_by(step)(batch), pipeline.finished(batch), strict=True):
            level = (view - wanted).abs() * torch.tensor(settings.std)[:, None, None] * 255
            assert level.max() < 1.01  # where a half is rounded
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the crop's and the colours'


def test_what_does_not_fit_is_loaded(
    photographs: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = resident.ResidentImages.of(photographs, CPU, batch=8)
    assert images is not None
    assert images.pixels.shape == (24, 90, 129, 3)
    assert images.sizes_A2[:2].tolist() == [[60, 90], [63, 88]]
    assert np.array_equal(images.sizes_A2[5], images.sizes_A2[6])  # the next stands in for the broken one
    monkeypatch.setattr(resident, "LOOKED_AT", 1)  # so that larger ones come later
    monkeypatch.setattr(resident, "MOST_AT_ONCE", 5)
    grown = resident.ResidentImages.of(photographs, CPU, batch=8)
    assert grown is not None and torch.equal(grown.pixels, images.pixels)
    whole = (images.pixels.numel() + resident.STEP_BYTES * 8 * 90 * 129) / resident.SHARE
    monkeypatch.setattr(resident, "memory_of", lambda _: whole - 1)
    assert resident.ResidentImages.of(photographs, CPU, batch=8) is None
    with pytest.raises(UserError, match="--data-on device: 24 images take more than their share"):
        InputPipeline.of(settings_of(photographs, tmp_path, data_on="device"), photographs, CPU)


def test_images_none_of_which_can_be_read_are_refused(photographs: ImageDataset) -> None:
    for i in range(len(photographs)):
        (photographs.root / photographs.key(i)).write_bytes(b"no image")
    with pytest.raises(BrokenImage, match="in a row cannot be read"):
        resident.ResidentImages.of(photographs, CPU, batch=8)


def test_images_on_the_device_are_no_workers_business(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave one of the two out"):
        tiny(tmp_path, tmp_path, data_on="device", augment_on="workers")
