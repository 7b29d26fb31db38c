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
    from pretrain.profile import main
    from pretrain.step_timing import PARTS

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
    from pretrain import profile, step_timing

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


def test_profile_recommends_only_what_was_faster() -> None:
    from pretrain.step_timing import speedups

    seconds = {"data wait": 0.2, "transfer and augment": 0.0, "forward": 0.8}
    tried = {
        "--workers 4": {"data wait": 0.0, "forward": 0.4},  # forward cannot have gained: 1 - 0.2 is the least
        "--precision auto": {"data wait": 0.2, "forward": 0.3},
        "--augment-on device": {"data wait": 0.2, "forward": 1.0},
    }
    gains = speedups(seconds, tried)
    assert list(gains) == ["--precision auto", "--workers 4", "--augment-on device"]
    assert list(gains.values()) == pytest.approx([2.0, 1.25, 1 / 1.2])


def test_profile_tries_nothing_that_changes_the_method() -> None:
    from pretrain.step_timing import alternatives

    settings = parse_recipe(["--recipe", "cifar10_ep1000", "--data-dir", "d", "--output", "o"])
    for device in (torch.device("cpu"), torch.device("cuda")):
        for changed in alternatives(dataclasses.replace(settings, precision="float32"), device).values():
            same = {"workers", "augment_on", "precision", "compile", "jpeg_draft"}
            before, after = dataclasses.asdict(settings), dataclasses.asdict(changed)
            differ = {name for name in before if before[name] != after[name]}
            assert len(differ) == 1 and differ <= same
