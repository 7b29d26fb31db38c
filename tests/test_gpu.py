"""What a GPU alone can show: the same numbers as on a CPU, half precision, copies that nothing waits for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import load_checkpoint, to_host
from pretrain.common.files import read_jsonl
from pretrain.common.signals import Stopped
from pretrain.data.datasets import open_dataset
from pretrain.input_pipeline import InputPipeline
from pretrain.learner import Learner
from pretrain.loss import CAPTURABLE
from pretrain.network.model import build_backbone
from pretrain.objectives.intl import intl_loss
from pretrain.settings import Settings
from pretrain.train import train
from pretrain.views.augment import View, uniforms
from pretrain.views.batch import moved
from pretrain.views.colours import draw_colours, finish
from pretrain.views.loader import FIRST_COLOUR_SLOT
from tests.helpers.training import differing, stop_after_epoch_one, tiny, weights
from transfer.api import linear_probe
from transfer.evaluation.feature_scaling import ScaledRows
from transfer.evaluation.features import Extractor
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators import linear_features
from transfer.evaluators.knn_vote import knn_evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # looked at once, at the first product


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("whitening", ["channel", "batch"])
def test_the_loss_is_the_cpus(whitening, gpu: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(32, 96, generator=g, dtype=torch.float64) for _ in range(2)]
    found = []
    for device in (torch.device("cpu"), gpu):
        moved = [z.to(device).requires_grad_() for z in views]
        loss = intl_loss(moved, whitening=whitening, trade_off=0.02).total
        found.append([loss.cpu(), *(x.cpu() for x in torch.autograd.grad(loss, moved))])
    for cpu, cuda in zip(*found):
        torch.testing.assert_close(cuda, cpu, rtol=1e-8, atol=1e-10)


def test_colours_are_the_cpus(gpu: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8, generator=g)
    colours = draw_colours(
        uniforms(0, 0, np.arange(16), 0)[:, FIRST_COLOUR_SLOT:], View(size=64, blur_p=1.0, solarise_p=0.0)
    )
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    here = finish(pixels, colours, mean=mean, std=std)
    there = finish(pixels.to(gpu), moved(colours, gpu), mean=mean.to(gpu), std=std.to(gpu))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_in_each_precision_goes_on_where_it_was(
    precision: str, gpu: torch.device, cifar_folder: Path, tmp_path: Path
) -> None:
    settings = tiny(
        cifar_folder, tmp_path, precision=precision, ema=True, deterministic=True, hook_every_epochs=1
    )
    with pytest.raises(Stopped):
        train(settings, gpu, hook=stop_after_epoch_one)
    train(settings, gpu)
    assert all(torch.isfinite(v.float()).all() for v in weights(tmp_path).values())
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["peak_memory_gib"] > 0


def steps_apart(gpu: torch.device, one: Settings, other: Settings) -> float:
    """How far the weights of two runs end from each other, as a share of the way that the first went.

    All together: of single ones a rounding now and then turns a ReLU, and moves some by a hundredth.
    """
    start = Learner.build(one, torch.device("cpu"), torch.float32).encoder.state_dict()
    ends = [ended_with(settings, gpu) for settings in (one, other)]
    names = [name for name, value in start.items() if value.is_floating_point()]

    def together(state: dict[str, torch.Tensor], branch: str) -> torch.Tensor:
        return torch.cat([state[branch + name].flatten() for name in names])

    begun, shares = together(start, ""), []
    for branch in ("model.", "ema.") if one.ema else ("model.",):
        first, second = (together(end, branch) for end in ends)
        shares.append(float((second - first).norm() / (first - begun).norm()))
    return max(shares)


def ended_with(settings: Settings, gpu: torch.device) -> dict[str, torch.Tensor]:
    train(settings, gpu)
    return weights(Path(settings.output))


@pytest.mark.parametrize(("how", "steps"), [("graph", 6), ("compiled_graph", 1)])
def test_a_step_ends_with_the_weights_of_the_called_one(
    how: str, steps: int, gpu: torch.device, cifar_folder: Path, tmp_path: Path
) -> None:
    """Schedule of learning rate and EMA included. Compiled kernels sum in another order, and this network
    doubles a difference of 1e-6 in weights at every step many times over: after one it is small."""
    alike = {
        "ema": True,
        "ema_momentum": 0.9,
        "max_steps": steps,
        "deterministic": True,
        "view_sizes": [16, 16],
    }
    eager, other = (tiny(cifar_folder, tmp_path / step, step=step, **alike) for step in ("eager", how))
    assert steps_apart(gpu, eager, other) < 1e-3


@pytest.mark.parametrize("objective", sorted(CAPTURABLE))
def test_a_graph_beside_a_loader_is_the_called_step(
    objective: str, gpu: torch.device, cifar_folder: Path, tmp_path: Path
) -> None:
    """The loader's thread pins batches while the step is captured. A learning rate that is 3 % off would end
    1e-2 apart, roundings 1e-6 to 1e-4."""
    alike = {"objective": objective, "max_steps": 3, "deterministic": True, "data_on": "host", "workers": 1}
    eager, graph = (tiny(cifar_folder, tmp_path / how, step=how, **alike) for how in ("eager", "graph"))
    assert steps_apart(gpu, eager, graph) < 1e-3


def test_a_run_cut_off_ends_to_the_bit_as_an_undisturbed_one(
    gpu: torch.device, cifar_folder: Path, tmp_path: Path
) -> None:
    whole, cut = (
        tiny(cifar_folder, tmp_path / name, ema=True, deterministic=True, hook_every_epochs=1)
        for name in ("whole", "cut")
    )
    train(whole, gpu)
    with pytest.raises(Stopped):
        train(cut, gpu, hook=stop_after_epoch_one)
    train(cut, gpu)
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["config"]["step"] == "graph"
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_views_made_on_the_gpu_are_the_loaders(gpu: torch.device, cifar_folder: Path, tmp_path: Path) -> None:
    images = open_dataset("cifar10", cifar_folder, "train")
    found = []
    for where in ("host", "device"):
        settings = tiny(cifar_folder, tmp_path, data_on=where, jitter_p=[0.0], solarise_p=[0.0])
        pipeline = InputPipeline.of(settings, images, gpu)
        assert (pipeline.resident is None) == (where == "host")
        found.append([pipeline.finished(moved(batch, gpu)) for batch in pipeline.batches(0, 3)])
    for host, device in zip(*found, strict=True):
        for a, b in zip(host, device, strict=True):
            level = (a - b).abs().cpu() * torch.tensor(settings.std)[:, None, None] * 255
            assert level.max() < 2.01 and level.mean() < 0.1


def test_copies_hold_what_was_there_when_they_were_asked_for(gpu: torch.device) -> None:
    big = torch.ones(1 << 24, device=gpu)
    copied = to_host({"w": big})
    big.zero_()  # behind the copy on the same stream
    torch.cuda.synchronize()
    assert copied["w"].is_pinned() and bool((copied["w"] == 1).all())


def test_bfloat16_features_find_the_neighbours_of_float32(gpu: torch.device, cifar_folder: Path) -> None:
    torch.manual_seed(0)
    model = build_backbone("resnet18").eval()
    train_part, test_part = (open_dataset("cifar10", cifar_folder, s) for s in ("train", "test"))
    transform = EvalTransform(size=32)
    found = []
    for precision in ("float32", "bfloat16"):
        extractor = Extractor(model, transform, gpu, precision)
        bank, queries = (
            extractor(transform.square([transform.decode(part.image(i)) for i in range(len(part))])).cpu()
            for part in (train_part, test_part)
        )
        found.append(
            knn_evaluate(bank, train_part.labels_N, queries, test_part.labels_N, ks=[20], device=gpu)
        )
    assert abs(found[0]["top1_k20"] - found[1]["top1_k20"]) < 5


@pytest.mark.parametrize(
    ("metric", "vote"), [("cosine", "weighted"), ("dot", "majority"), ("euclidean", "majority")]
)
def test_neighbours_of_features_on_the_gpu_are_the_cpus(metric: str, vote: str, gpu: torch.device) -> None:
    """Of whole numbers dot products and distances are exact, and so are their many ties."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randint(-3, 4, (600, 16), generator=g).float(), torch.randint(0, 9, (600,), generator=g)
    if metric == "cosine":
        x = torch.randn(600, 16, generator=g, dtype=torch.float64)
    found = [
        knn_evaluate(
            *(t.to(device) for t in (x[:500], labels[:500], x[500:], labels[500:])), ks=[1, 20],
            metric=metric, vote=vote, device=device, per_class=True,  # type: ignore[arg-type]
        )
        for device in (torch.device("cpu"), gpu)
    ]  # fmt: skip
    assert found[1] == pytest.approx(found[0], abs=1e-9)


def test_a_probe_of_features_that_a_gpu_has_no_room_for_reads_them_batch_by_batch(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = np.random.default_rng(0)
    labels = g.integers(0, 5, 900)
    x = (g.normal(size=(900, 24)) + np.eye(5, 24)[labels]).astype(np.float32)
    parts = (x[:700], labels[:700], x[700:], labels[700:])
    found, held = [], []
    on = ScaledRows.on
    monkeypatch.setattr(ScaledRows, "on", lambda *args: held.append(args) or on(*args))
    for share, parts_held in ((linear_features.GPU_SHARE, 3), (0.0, 0)):
        monkeypatch.setattr(linear_features, "GPU_SHARE", share)
        held.clear()
        found.append(linear_probe(*parts, device=gpu))
        assert len(held) == parts_held
    on_cpu = linear_probe(*parts, device=torch.device("cpu"))
    assert found[1] == found[0] and found[0]["top1"] == pytest.approx(on_cpu["top1"], abs=1.5)  # 3 of 200
