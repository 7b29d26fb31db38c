"""k-NN of the running backbone: the number the finished weights get, and a run that ends as without it."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl
from pretrain.common.signals import StopSignals
from pretrain.network.model import build_backbone
from pretrain.network.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
from pretrain.train import load_hook, train
from slurm.steps import tasks
from slurm.steps.tasks import Images
from tests.helpers.ranks import start_ranks, wait_ranks
from tests.helpers.tiny_resnet import ARCH
from tests.helpers.training import CPU, differing, tiny, weights
from transfer import hooks
from transfer.evaluation import results
from transfer.evaluators import knn
from transfer.report.evidence.collect import collect
from transfer.report.pages.plots import pretraining_plots


@pytest.fixture(scope="module")
def watched(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with the hook at the end of each."""
    output = tmp_path_factory.mktemp("watched") / "run"
    settings = tiny(cifar_folder, output, hook="transfer.hooks:knn", hook_every_epochs=1)
    train(settings, CPU, hook=load_hook(settings.hook))
    return output


def test_a_run_with_the_hook_ends_with_the_same_weights_to_the_bit(
    watched: Path, cifar_folder: Path, tmp_path: Path
) -> None:
    train(tiny(cifar_folder, tmp_path / "run"), CPU)
    assert differing(watched, tmp_path / "run") == [] and len(weights(watched)) > 120
    with_hook, without = (torch.load(p / "checkpoint.pt") for p in (watched, tmp_path / "run"))
    assert torch.equal(with_hook["rng"]["torch"], without["rng"]["torch"])


def test_it_logs_what_the_finished_weights_get(watched: Path, cifar_folder: Path, tmp_path: Path) -> None:
    logged = [r for r in read_jsonl(watched / "metrics.jsonl") if "knn_top1" in r]
    assert [(r["step"], r["epoch"]) for r in logged] == [(4, 1), (8, 2)]
    words = ["--weights", str(watched / "backbone.safetensors"), "--protocol", "solo_knn@1"]
    words += ["--dataset", "cifar10", "--data-dir", str(cifar_folder), "--output", str(tmp_path)]
    assert knn.main([*words, "--precision", "float32"]) == 0
    (found,) = results.read(tmp_path)
    assert found.image_size == 16
    # rounded to four digits in the result; a control: the first epoch's backbone gets another number
    assert found.metrics["top1_k20"] == pytest.approx(logged[1]["knn_top1"], abs=1e-4)
    assert found.metrics["top5_k20"] == pytest.approx(logged[1]["knn_top5"], abs=1e-4)
    assert (logged[0]["knn_top1"], logged[0]["knn_top5"]) != (logged[1]["knn_top1"], logged[1]["knn_top5"])


def test_the_report_draws_it(watched: Path) -> None:
    (run,) = collect([watched]).pretraining
    (plot,) = [p for p in pretraining_plots([run]) if p.name == "pretrain-knn"]
    assert plot.title == "k-NN of the running backbone" and "top-1, percent" in plot.svg
    silent = dataclasses.replace(run, rows=tuple({**r, "knn_top1": None} for r in run.rows))
    assert "pretrain-knn" not in {p.name for p in pretraining_plots([silent])}


def test_one_of_two_ranks_looks_on_while_the_other_waits(cifar_folder: Path, tmp_path: Path) -> None:
    settings = tiny(cifar_folder, tmp_path / "run", epochs=1, hook_every_epochs=1)
    wait_ranks(start_ranks(settings, "--hook", "transfer.hooks:knn"), 0)
    logged = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "knn_top1" in r]
    assert [r["step"] for r in logged] == [4] and (tmp_path / "run" / "backbone.safetensors").exists()


def test_backbone_and_random_states_are_left_alone(cifar_folder: Path, tmp_path: Path) -> None:
    """A backbone with SyncBatchNorm, as several ranks have it."""
    torch.manual_seed(0)
    backbone = convert_sync_batchnorm(build_backbone(ARCH), CPU).eval()
    assert any(isinstance(m, SyncBatchNorm) for m in backbone.modules())
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    found = hooks.knn(backbone, tiny(cifar_folder, tmp_path))
    assert 0 < found["knn_top1"] < found["knn_top5"] <= 100
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert not backbone.training and all(p.grad is None for p in backbone.parameters())


def test_large_sets_are_thinned_out_evenly(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # 10 of 0 ... 18: steps of two. 640 images in ten classes of 64: 80 evenly spaced ones are 8 of each.
    assert hooks.evenly_spaced(19, 10).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert hooks.evenly_spaced(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(hooks.evenly_spaced(640, 80) // 64).tolist() == [8] * 10
    monkeypatch.setattr(hooks, "MOST_BANK", 80)
    monkeypatch.setattr(hooks, "MOST_QUERIES", 30)
    with caplog.at_level("INFO"):
        assert "knn_top1" in hooks.knn(build_backbone(ARCH), tiny(cifar_folder, tmp_path))
    assert "80 of 640 bank images, 30 of 160 queries" in caplog.text


def test_a_broken_image_is_left_out_and_no_test_images_are_a_warning(
    cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(cifar_folder, data)
    broken = sorted((data / "train").rglob("*.jpg"))[100]
    broken.write_bytes(broken.read_bytes()[:200])
    backbone = build_backbone(ARCH)
    with caplog.at_level("INFO"):
        assert "knn_top1" in hooks.knn(backbone, tiny(data, tmp_path))
    assert "639 of 640 bank images, 160 of 160 queries" in caplog.text
    shutil.rmtree(data / "test")
    assert hooks.knn(backbone, tiny(data, tmp_path)) == {}
    assert "no k-NN of the running backbone:" in caplog.text and "has no val/" in caplog.text
    torch.nn.init.constant_(backbone.conv1.weight, float("nan"))
    assert hooks.knn(backbone, tiny(cifar_folder, tmp_path)) == {}
    assert "not finite" in caplog.text


def test_a_run_told_to_stop_does_not_wait_for_it(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "heard", 15)
    monkeypatch.setattr(hooks.Extractor, "__call__", lambda *_: pytest.fail("went on"))
    assert hooks.knn(build_backbone(ARCH), tiny(cifar_folder, tmp_path)) == {}


def test_pretraining_steps_have_it_unless_told_otherwise(tmp_path: Path, cifar_folder: Path) -> None:
    images = Images(dataset="cifar10", data_dir=cifar_folder)
    own = tmp_path / "own.yaml"
    own.write_text("hook: my.module:look\n")

    def hook_of(step: tasks.Step) -> str | None:
        at = step.argv.index("--recipe")
        return tasks.recipe_settings(
            step.argv[at + 1], step.argv[at + 2 :], data_dir=None, output=""
        ).hook  # fmt: skip

    def made(recipe: str, *extra: str) -> str | None:
        return hook_of(tasks.pretraining(tmp_path, recipe, images, 0, extra))

    assert made("demo_cifar10") == "transfer.hooks:knn"
    assert made("demo_cifar10", "--hook", "null") is None and made("demo_cifar10", "--hook=null") is None
    assert made("demo_cifar10", "--hook", "a:b") == "a:b"
    with pytest.raises(UserError, match=r"if you trust it, give --hook my\.module:look"):
        made(str(own))
    assert made(str(own), "--hook", "my.module:look") == "my.module:look"
    assert hook_of(tasks.control(tmp_path, "demo_cifar10", images, 0)) is None


@pytest.mark.parametrize("name", ["demo_fashion_mnist", "demo_cifar10"])
def test_the_demo_is_over_before_it_is_called(name: str) -> None:
    settings = tasks.recipe_settings(name, [], data_dir="", output="")
    assert settings.epochs < settings.hook_every_epochs
