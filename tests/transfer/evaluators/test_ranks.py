"""Evaluators on several ranks: the features and heads of one process, each image once, also after a kill."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import transfer.evaluation.feature_cache
from pretrain.common.process_group import rank
from pretrain.data.datasets import ImageDataset, open_dataset
from tests.helpers.ranks import finish_ranks, fork_ranks, kill_ranks, run_on_ranks
from tests.helpers.tiny_resnet import save_tiny
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation import results
from transfer.evaluation.feature_cache import FeatureFolder
from transfer.evaluation.features import Extractor, extract
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators import linear
from transfer.evaluators.heads import HeadGrid, HeadGrids

BACKBONE = Backbone(model=None, arch=None, weights={"sha256": "s", "branch": "online"}, metadata={})
PART = 24  # images on average, of 160
WORLDS = [1, 2, 3]


class Noted(Extractor):
    """Notes in a file of this rank how many images it has seen; kills itself at a given one."""

    def __init__(self, notes: Path, die_at: int | None = None) -> None:
        super().__init__(None, EvalTransform(size=32), torch.device("cpu"), "float32")
        self.notes, self.die_at, self.seen = notes, die_at, 0

    def __call__(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels_B3HW)
        if self.die_at is not None and self.seen >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.notes / str(rank()), "a") as file:
            file.write(f"{len(pixels_B3HW)}\n")
        return super().__call__(pixels_B3HW)

    @staticmethod
    def total(notes: Path) -> list[int]:
        """Images seen by each rank."""
        files = sorted(notes.iterdir(), key=lambda p: int(p.name))
        return [sum(map(int, file.read_text().split())) for file in files]


def extract_here(images: ImageDataset, cache: Path, notes: Path, die_at: int | None = None) -> None:
    """What each rank does; rank 1 dies after `die_at` images, or rank 0 where it is alone."""
    transfer.evaluation.feature_cache.PART = PART
    victim = rank() == min(1, int(os.environ["WORLD_SIZE"]) - 1)
    extractor = Noted(notes, die_at if victim else None)
    got = extract(extractor, BACKBONE, images, cache=cache, batch_size=10)
    assert got.shape == (160, 3 * 32 * 32)


@pytest.fixture(scope="module")
def images(cifar_folder: Path) -> ImageDataset:
    return open_dataset("cifar10", cifar_folder, "test")


@pytest.fixture(scope="module")
def wanted(images: ImageDataset) -> np.ndarray:
    """Each image's features on their own, in order; all different, so that none can stand for another."""
    extractor = Extractor(None, EvalTransform(size=32), torch.device("cpu"), "float32")
    rows = [extractor(extractor.transform.decode(images.image(i))[None]) for i in range(160)]
    assert len(torch.cat(rows).unique(dim=0)) == 160
    return torch.cat(rows).numpy()


def features_in(cache: Path) -> np.ndarray:
    parts, folder = sorted(cache.iterdir(), key=lambda f: not f.name.startswith("parts-"))
    assert {p.name for p in folder.iterdir()} == {"features.npy", "meta.json"}
    assert {p.name for p in parts.iterdir()} == {"lock"}
    return np.load(folder / "features.npy")


def lengths(images: ImageDataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each part."""
    monkeypatch.setattr(transfer.evaluation.feature_cache, "PART", PART)
    there = FeatureFolder.of(cache, {}, images, np.arange(len(images)))
    found = [part.stop - part.start for part in there.parts]
    assert sum(found) == 160 and len(found) >= 4
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_extract_each_image_once(
    world: int, images, wanted: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, notes = tmp_path / "cache", tmp_path / "notes"
    notes.mkdir()
    run_on_ranks(world, extract_here, images, cache, notes)
    np.testing.assert_array_equal(features_in(cache), wanted)
    dealt = lengths(images, cache, monkeypatch)  # in turn
    assert Noted.total(notes) == [sum(dealt[r::world]) for r in range(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_killed_ranks_go_on_where_they_were(
    world: int, images, wanted: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of one rank in its second part; then again with one rank more, which changes nothing."""
    cache, notes, after = tmp_path / "cache", tmp_path / "notes", tmp_path / "after"
    notes.mkdir()
    after.mkdir()
    number = min(1, world - 1)
    ranks = fork_ranks(
        world, extract_here, images, cache, notes, lengths(images, cache, monkeypatch)[number] + 5
    )
    victim = ranks[number]
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    time.sleep(0.3)  # whatever the others still write, they have written, or are killed while they do
    kill_ranks(ranks)
    kept = sum(len(np.load(part)["features"]) for part in cache.glob("parts-*/*.npz"))
    assert 0 < kept < 160 and not list(cache.glob("*/features.npy"))
    run_on_ranks(world + 1, extract_here, images, cache, after)
    np.testing.assert_array_equal(features_in(cache), wanted)
    assert sum(Noted.total(after)) == 160 - kept


OPTIONS: list[dict[str, Any]] = [
    {"optimizer": "sgd"}, {"optimizer": "lars"}, {"optimizer": "adam"},
    {"optimizer": "adamw", "init": "uniform"},
]  # fmt: skip


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of 16, 16, 7 and 1 images: shares of different sizes, and none at all for the second rank."""
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(b, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (b,), generator=g))
        for b in (16, 16, 7, 1)
    ]


def train_heads(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    world = int(os.environ.get("WORLD_SIZE", 1))
    found = []
    for options in OPTIONS:
        heads = HeadGrid(6, 3, rates=[0.3, 0.01], decays=[0.0, 0.1], seed=5, **options)
        losses = [heads.step(x[rank() :: world], y[rank() :: world], factor=0.9) for x, y in batches()]
        found.append((heads.state(), losses))
    torch.save(found, folder / f"{world}-{rank()}.pt")


def test_heads_on_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    run_on_ranks(1, train_heads, tmp_path)
    run_on_ranks(2, train_heads, tmp_path)
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone[0][0]["parameters"][0].dtype == torch.float64
    for found in ranks:
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)


def probe(words: list[str], output: Path) -> None:
    made: list[HeadGrids] = []

    class Kept(HeadGrids):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    linear.HeadGrids = Kept  # type: ignore[misc]
    assert linear.main([*words, "--output", str(output)]) == 0
    torch.save(made[0].state(), output / f"heads{rank()}.pt")


@pytest.mark.parametrize("augmentation", [False, True], ids=["cached", "augmented"])
def test_a_linear_probe_on_two_ranks_scores_as_on_one(
    augmentation: bool, cifar_folder: Path, tmp_path: Path
) -> None:
    """580 images in batches of 193, 193, 193 and 1: the last has none for the second rank."""
    weights = save_tiny(tmp_path / "w.safetensors")
    values = {
        "augmentation": augmentation, "learning_rates": [0.01, 0.001], "batch": 193, "epochs": 2,
        "held_out_percent": 10, "scaling": "none" if augmentation else "standardise",
    }  # fmt: skip
    protocol = tmp_path / "mine@1.yaml"
    protocol.write_text(yaml.safe_dump({"task": "linear", "title": "t", "source": "s", "values": values}))
    words = ["--weights", str(weights), "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
    words += ["--protocol", str(protocol), "--precision", "float32", "--image-size", "16"]
    for world in (1, 2):
        ranks = fork_ranks(world, probe, words, tmp_path / str(world))
        assert finish_ranks(ranks) == [0] * world
    one, two = (results.read(tmp_path / str(world)) for world in (1, 2))
    alone, *shared = (torch.load(tmp_path / f) for f in ("1/heads0.pt", "2/heads0.pt", "2/heads1.pt"))
    assert alone["layer4"]["steps"] == 8
    for heads in shared:  # float32 sums in another order
        torch.testing.assert_close(heads, alone, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(shared[0], shared[1], rtol=0, atol=0)
    assert [r.selection for r in one] == [r.selection for r in two] == ["last", "held-out"]
    for a, b in zip(one, two):
        assert (a.settings["world_size"], b.settings["world_size"]) == (1, 2)
        assert a.n == b.n == 160 and a.epoch == b.epoch
        for name, value in a.metrics.items():  # rounding may move one image over a border
            assert b.metrics[name] == pytest.approx(value, abs=100 / 160 + 1e-3), name
        assert augmentation or a.metrics["top1"] > 10  # chance
        for mine, theirs in zip(a.settings["sweep"], b.settings["sweep"]):
            assert mine["top1"] == pytest.approx(theirs["top1"], abs=100 / 60 + 1e-3)
