"""How long each part of a training step takes on this machine, and with one option changed."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import torch

from pretrain.common.machine import cores
from pretrain.common.progress import Progress
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.loader import colour_place
from pretrain.input_pipeline import InputPipeline, workers_of
from pretrain.learner import Learner, choose_dtype
from pretrain.loss import loss_of
from pretrain.plan import Plan
from pretrain.settings import Settings

LOADER = ("--augment-on", "--workers", "--jpeg-draft")
WORTH = 1.05
"""Times as fast; smaller speed-ups are noise."""
WARM_UP = 3
PARTS = ("data wait", "transfer and augment", "forward", "loss", "backward", "optimizer")


def report(settings: Settings, steps: int) -> None:
    """Time some steps part by part, and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = alternatives(settings, device)
    images = open_dataset(settings.dataset, settings.data_dir, "train", labelled=False)
    with Progress((1 + len(others)) * (steps + WARM_UP), label="profile") as bar:
        seconds = time_parts(settings, images, device, steps, bar)
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        tried = {option: time_parts(other, images, device, steps, bar) for option, other in others.items()}
    total = sum(seconds.values())
    for part, value in seconds.items():
        print(f"{part:22s}{1000 * value:10.1f} ms{100 * value / total:7.1f} %")
    print(f"{'step':22s}{1000 * total:10.1f} ms, {settings.batch_global / total:.0f} images/s on {device}")
    print(_said_of_placement(settings, device))
    flops, peak = step_flops(settings), matmul_flops_per_s(choose_dtype(settings.precision, device), device)
    print(f"model: {flops / 1e9:.1f} GFLOP a step (forward and backward, multiply-add counted as two)")
    share = 100 * flops / total / peak
    print(f"reached {flops / total / 1e9:.0f} GFLOP/s, {share:.0f} % of what a large matrix product reaches")
    if peak_gib is not None:
        print(f"peak memory: {peak_gib:.1f} GiB")
    gains = speedups(seconds, tried)
    for option, gain in gains.items():
        print(f"with {option:22s}{1000 * total / gain:10.1f} ms a step, {gain:.2f} times as fast")
    worth = [option for option, gain in gains.items() if gain >= WORTH][:3]
    print(f"worth changing first: {'; '.join(worth) or 'nothing of what was tried'}")


def alternatives(settings: Settings, device: torch.device) -> dict[str, Settings]:
    """The same run with one option changed, by that option: those that leave the method as it is.

    Batch, views and projector would change a step's time too, but what is trained with it.
    """
    changes: dict[str, Any] = {}
    workers = workers_of(settings, device)
    if settings.augment_on == "auto" and (device.type == "cuda" or workers > 0):
        changes["augment_on"] = "device" if colour_place("auto", workers, device)[0] else "workers"
    if workers < cores():
        changes["workers"] = min(max(2 * workers, 1), cores())
    dtype, native = (choose_dtype(p, device) for p in (settings.precision, "auto"))
    if dtype != native:
        changes["precision"] = "auto"
    elif device.type == "cpu" and dtype == torch.bfloat16:
        changes["precision"] = "float32"
    if device.type == "cuda" and not settings.compile:
        changes["compile"] = True
    if not settings.jpeg_draft:
        changes["jpeg_draft"] = True
    return {
        f"--{name.replace('_', '-')} {str(value).lower()}": dataclasses.replace(settings, **{name: value})
        for name, value in changes.items()
    }


def speedups(seconds: dict[str, float], tried: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as fast a step is with each option, the best first.

    Loader options save at most the current data wait; more than that is noise.
    """
    total = sum(seconds.values())
    waits = seconds["data wait"] + seconds["transfer and augment"]
    gains = {}
    for option, parts in tried.items():
        least = total - waits if option.startswith(LOADER) else 0.0
        gains[option] = total / max(sum(parts.values()), least)
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def _said_of_placement(settings: Settings, device: torch.device) -> str:
    _, where = colour_place(settings.augment_on, workers_of(settings, device), device)
    return f"colour and blur {where} (--augment-on {settings.augment_on})"


def time_parts(
    settings: Settings, images: ImageDataset, device: torch.device, steps: int, bar: Progress
) -> dict[str, float]:
    """Mean seconds of each part of a step after some to warm up, the device waited for after each."""
    Plan.of(settings, len(images), 1)
    learner = Learner.build(settings, device, choose_dtype(settings.precision, device))
    learner.start(compiled=settings.compile)
    loss_of_views = loss_of(settings)
    pipeline = InputPipeline.of(settings, images, device)
    loader = pipeline.batches(0, steps + WARM_UP)
    seconds = dict.fromkeys(PARTS, 0.0)
    for step in range(steps + WARM_UP):
        marks = [_now(device)]
        batch = next(loader)
        marks.append(_now(device))
        made = pipeline.on_device(batch)
        marks.append(_now(device))
        embeddings = learner.embed(made)
        marks.append(_now(device))
        loss = loss_of_views(embeddings, step)
        marks.append(_now(device))
        learner.stepper.backward(loss.total)
        marks.append(_now(device))
        learner.stepper.update(0.0)  # the weights stay
        learner.update_target(settings.ema_momentum)
        marks.append(_now(device))
        if step >= WARM_UP:
            for part, a, b in zip(PARTS, marks, marks[1:]):
                seconds[part] += (b - a) / steps
        bar.update(1)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_flops(settings: Settings) -> float:
    """Floating-point operations of a step: fvcore's count of one image a view; backward is twice forward."""
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    learner = Learner.build(settings, torch.device("cpu"), torch.float32)
    learner.encoder.eval()
    total = 0.0
    for place, size in enumerate(settings.view_sizes):
        count = FlopCountAnalysis(learner.encoder, ([torch.zeros(1, 3, size, size)],))
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        target = settings.ema and place == 0
        total += 2 * count.total() * (1 if target else 3)
    return total * settings.batch_global


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """What a large matrix product reaches here: the peak that the step is held against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = _now(device)
        a @ a
        best = min(best, _now(device) - start)
    return 2 * n**3 / best
