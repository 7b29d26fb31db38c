"""`python -m pretrain.profile`: a step accounted for, and advice that leaves the method as it is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.input_pipeline import InputPipeline
from pretrain.settings import parse_recipe
from tests.helpers.tiny_resnet import ARCH


def test_profile_accounts_for_a_step(cifar_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.profile.__main__ import main
    from pretrain.profile.step_timing import PARTS

    main([
        "--steps", "1", "--dataset", "cifar10", "--data-dir", str(cifar_folder), "--arch", "resnet18",
        "--view-sizes", "[32, 32]", "--projector-hidden", "64", "--projector-output", "64",
        "--batch-global", "10", "--workers", "0",
    ])  # fmt: skip
    out = capsys.readouterr().out
    shares = [float(line.split()[-2]) for line in out.splitlines() if line.startswith(PARTS)]
    assert len(shares) == len(PARTS) and sum(shares) == pytest.approx(100, abs=0.5)
    assert "worth changing first" in out
    # ResNet-18 has 1.8 G multiply-adds at 224 px, so (32 / 224)^2 of it here; 2 views, 3 passes, 10 images.
    flops = float(out.split("model: ")[1].split()[0])
    assert flops == pytest.approx(1.82 * (32 / 224) ** 2 * 2 * 2 * 3 * 10, rel=0.1)
    assert "colour and blur in the training process (--augment-on auto)\n" in out  # there are no workers


def test_profile_times_both_places_of_colour_and_blur(
    cifar_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.profile import __main__ as profile
    from pretrain.profile import step_timing

    used = []
    pipeline_of = InputPipeline.of

    def noted(*args: Any) -> InputPipeline:
        made = pipeline_of(*args)
        used.append(made.views.finish_here)
        return made

    monkeypatch.setattr(InputPipeline, "of", staticmethod(noted))
    monkeypatch.setattr(step_timing.torch.cuda, "is_available", lambda: False)
    tiny = [
        "--steps", "1", "--dataset", "cifar10", "--data-dir", str(cifar_folder), "--arch", ARCH,
        "--view-sizes", "[16, 16]", "--projector-hidden", "64", "--projector-output", "64",
        "--batch-global", "16", "--workers", "1",
    ]  # fmt: skip
    profile.main(tiny)
    out = capsys.readouterr().out
    assert used[:2] == [True, False]  # without a GPU the workers' is the one chosen, and the table's
    assert "colour and blur in the workers (--augment-on auto)\n" in out
    assert re.search(r"with --augment-on device +[\d.]+ ms a step, [\d.]+ times as fast", out)
    tried = len(used)
    profile.main([*tiny, "--augment-on", "device"])
    out = capsys.readouterr().out
    assert not any(used[tried:]) and "with --augment-on" not in out


def test_an_option_of_the_loader_saves_at_most_the_wait() -> None:
    from pretrain.profile.step_timing import StepTime, gain_of

    now = StepTime(total=1.0, wait=0.2)
    assert gain_of("workers", now, StepTime(0.4, 0.0)) == pytest.approx(1.25)  # not 2.5
    assert gain_of("precision", now, StepTime(0.5, 0.2)) == 2
    assert gain_of("augment_on", now, StepTime(1.2, 0.2)) == pytest.approx(1 / 1.2)


def test_nothing_is_tried_once_the_seconds_are_over(
    cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.profile.__main__ import main

    main([
        "--steps", "1", "--seconds", "0", "--dataset", "cifar10", "--data-dir", str(cifar_folder),
        "--arch", ARCH, "--view-sizes", "[16, 16]", "--projector-hidden", "64", "--projector-output", "64",
        "--batch-global", "16", "--workers", "1",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "not timed, --seconds were over: --augment-on device" in out
    assert "worth changing first: nothing of what was tried" in out


def test_profile_tries_nothing_that_changes_the_method() -> None:
    from pretrain.profile.step_timing import alternatives

    settings = parse_recipe(["--recipe", "cifar10_ep1000", "--data-dir", "d", "--output", "o"])
    settings = dataclasses.replace(settings, precision="float32", step="eager", data_on="host")
    free = {"workers", "augment_on", "precision", "jpeg_draft", "step", "data_on"}
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert {name for name, _ in alternatives(settings, device)} <= free
    assert alternatives(settings, torch.device("cuda"))[-1] == ("step", "compiled_graph")
