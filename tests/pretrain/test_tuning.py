"""What a run takes that leaves precision and threads to the machine, and that it keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from pretrain import tuning
from pretrain.checkpoint import load_checkpoint
from pretrain.common.errors import UserError
from pretrain.common.signals import Stopped
from pretrain.input_pipeline import InputPipeline
from pretrain.settings import Settings, recorded
from pretrain.train import train
from tests.helpers.training import CPU, differing, stop_after_epoch_one, tiny

SMALL = {"view_sizes": [12, 12], "batch_global": 320, "log_every": 100}
AUTO = {"precision": "auto", "threads": "auto"}


LOADS = cast(InputPipeline, SimpleNamespace(resident=None))  # and makes no batch: nothing is to be timed


def untimed(*_: object) -> Any:
    raise AssertionError("nothing is to be timed")


def choice(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple, float], **asked: object) -> tuple:
    """What is taken on a machine with two threads and bfloat16, on which steps take so long."""
    timed: list[tuple] = []

    def of(settings: Settings) -> tuple:
        return settings.precision, settings.threads

    def look(settings: Settings, *_: object) -> float:
        timed.append(of(settings))
        return seconds[of(settings)]

    monkeypatch.setattr(tuning, "seconds_of_a_step", look)
    monkeypatch.setattr(tuning, "choose_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    settings = tiny(Path("d"), Path("o"), **(AUTO | asked))
    found = of(tuning.chosen(settings, CPU, LOADS, 10))
    assert len(timed) == len(set(timed)) == len(seconds)
    return found


def test_the_fastest_is_taken_and_one_thread_where_it_is_nearly_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow, wide = "bfloat16", "float32"
    slow = {(narrow, 2): 1.0, (narrow, 1): 1.2}
    assert choice(monkeypatch, slow | {(wide, 2): 0.5, (wide, 1): 0.6}) == (wide, 2)
    assert choice(monkeypatch, slow | {(wide, 2): 0.5, (wide, 1): 0.55}) == (wide, 1)  # 0.5 / 0.55 > 0.9
    assert choice(monkeypatch, slow | {(wide, 2): 1.5, (wide, 1): 1.6}) == (narrow, 2)
    assert choice(monkeypatch, {(narrow, 1): 1.0, (wide, 1): 2.0}, threads=1) == (narrow, 1)


def test_what_is_given_is_not_timed() -> None:
    given = tiny(Path("d"), Path("o"), threads=2, step="eager", data_on="host")
    assert tuning.chosen(given, CPU, LOADS, 10) == given
    assert tuning.taken_over(given, {"precision": "bfloat16", "threads": 1}) == given
    with pytest.raises(UserError, match="--threads must be at least 1, or auto, got 0"):
        tiny(Path("d"), Path("o"), threads=0)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_a_choice_is_written_down_and_kept_when_the_run_goes_on(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Uninterrupted with that choice given, the run ends with the same weights to the bit."""
    monkeypatch.setattr(tuning, "STEPS_S", 0.0)
    cut = tmp_path / "cut"
    with caplog.at_level("INFO"), pytest.raises(Stopped):
        train(tiny(cifar_folder, cut, hook_every_epochs=1, **SMALL, **AUTO), CPU, hook=stop_after_epoch_one)
    assert caplog.text.count("timed, in steps of 64 images a second: ") == 1
    used = yaml.safe_load((cut / "config.yaml").read_text())
    taken = {k: used[k] for k in AUTO}
    assert "auto" not in taken.values() and taken["threads"] in (1, 2)
    assert {k: load_checkpoint(cut / "checkpoint.pt")["config"][k] for k in AUTO} == taken
    monkeypatch.setattr(tuning, "seconds_of_a_step", untimed)
    train(tiny(cifar_folder, cut, **SMALL, **AUTO), CPU)
    train(tiny(cifar_folder, tmp_path / "whole", **SMALL, **taken), CPU)
    assert differing(tmp_path / "whole", cut) == []
    other = 1 + int(taken["threads"])
    with pytest.raises(UserError, match=f"threads: {taken['threads']} there, {other} now"):
        train(tiny(cifar_folder, cut, **SMALL, **(AUTO | {"threads": other})), CPU)


def test_what_a_gpu_takes_is_written_down_and_taken_over() -> None:
    settings = tiny(Path("d"), Path("o"))
    assert (settings.step, settings.data_on) == ("auto", "auto")
    chosen = tuning.chosen(settings, CPU, LOADS, 10)
    assert (chosen.step, chosen.data_on) == ("eager", "host")
    on_gpu = tuning.taken_over(settings, {"step": "compiled_graph", "data_on": "device"})
    assert (on_gpu.step, on_gpu.data_on) == ("compiled_graph", "device")
    older = tuning.taken_over(settings, {})  # a checkpoint from before there was a choice
    assert (older.step, older.data_on) == ("eager", "host")
    assert recorded({"precision": "float32"})["precision"] == "tf32"  # what PyTorch took it for
    assert recorded({"precision": "float32", "step": "graph"})["precision"] == "float32"
