"""How long each part of a training step takes on this machine, and with one option changed."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, NamedTuple

import torch

from pretrain import tuning
from pretrain.common.errors import UserError, gpu_full
from pretrain.common.machine import cores
from pretrain.data.datasets import open_dataset
from pretrain.input_pipeline import InputPipeline, workers_of
from pretrain.learner import Learner, choose_dtype
from pretrain.loss import loss_of
from pretrain.plan import Plan
from pretrain.settings import Settings
from pretrain.training_step import TrainingStep, how_to_step
from pretrain.views.batch import moved
from pretrain.views.loader import colour_place

LOADER = ("augment_on", "workers", "jpeg_draft", "data_on")
WORTH = 1.05
"""Times as fast; smaller speed-ups are noise."""
WARM_UP = 3
PARTS = ("data wait", "transfer and augment", "forward", "loss", "backward", "optimizer")


class StepTime(NamedTuple):
    """Seconds of a step, and those of them in which it waited for its images."""

    total: float
    wait: float


def report(settings: Settings, steps: int, seconds: float) -> None:
    """Time some steps as they are, part by part, and with one option changed while `seconds` are not over."""
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = open_dataset(settings.dataset, settings.data_dir, "train", labelled=False)
    pipeline = InputPipeline.of(settings, images, device)
    settings = tuning.chosen(settings, device, pipeline, Plan.of(settings, len(images), 1).steps)
    print(f"images: {pipeline.where}", flush=True)
    parts = time_parts(settings, pipeline, steps)
    now = StepTime(sum(parts.values()), parts["data wait"] + parts["transfer and augment"])
    for part, value in parts.items():
        print(f"{part:22s}{1000 * value:10.1f} ms{100 * value / now.total:7.1f} %")
    how = f"{settings.precision}, {settings.step}"
    if device.type == "cpu":
        _say_total(settings, now.total, f"on {device} ({how})")
    else:
        _say_total(settings, now.total, f"on {device}, eager, each part waited for")
        now = time_step(settings, pipeline, steps)
        _say_total(settings, now.total, f"as the run takes it ({how})")
    flops, peak = step_flops(settings), matmul_flops_per_s(settings.precision, device)
    print(f"model: {flops / 1e9:.1f} GFLOP a step (forward and backward, multiply-add counted as two)")
    reached = flops / now.total
    share = 100 * reached / peak
    print(f"reached {reached / 1e9:.0f} GFLOP/s, {share:.0f} % of what a large matrix product reaches")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    _say_alternatives(settings, pipeline, now, steps=steps, until=began + seconds)


def _say_total(settings: Settings, seconds: float, how: str) -> None:
    print(
        f"{'step':22s}{1000 * seconds:10.1f} ms, {settings.batch_global / seconds:.0f} images/s {how}",
        flush=True,
    )


def _say_alternatives(
    settings: Settings, pipeline: InputPipeline, now: StepTime, *, steps: int, until: float
) -> None:
    gains, left_out, device = {}, [], pipeline.device
    for name, value in alternatives(settings, device):
        option = f"--{name.replace('_', '-')} {str(value).lower()}"
        if time.monotonic() > until:
            left_out.append(option)
            continue
        try:
            other = dataclasses.replace(settings, **{name: value})
            theirs = InputPipeline.of(other, pipeline.views.images, device) if name in LOADER else pipeline
            seconds = now.total / gain_of(name, now, time_step(other, theirs, steps))
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"with {option:22s} not possible: {gpu_full(error) or error}", flush=True)
            continue
        gains[option] = now.total / seconds
        print(
            f"with {option:22s}{1000 * seconds:10.1f} ms a step, {gains[option]:.2f} times as fast",
            flush=True,
        )
    if left_out:
        print(f"not timed, --seconds were over: {'; '.join(left_out)}")
    worth = [option for option in sorted(gains, key=lambda o: -gains[o]) if gains[option] >= WORTH][:3]
    print(f"worth changing first: {'; '.join(worth) or 'nothing of what was tried'}")


def gain_of(name: str, now: StepTime, other: StepTime) -> float:
    """How many times as fast a step is with the option `name` changed.

    An option of the loader saves at most the wait for it; more than that is noise.
    """
    least = now.total - now.wait if name in LOADER else 0.0
    return now.total / max(other.total, least)


def alternatives(settings: Settings, device: torch.device) -> list[tuple[str, Any]]:
    """Options and other values of theirs that leave the method as it is, the slowest to time last.

    Batch, views and projector would change a step's time too, but what is trained with it.
    """
    tried: list[tuple[str, Any]] = []
    workers, resident = workers_of(settings, device), settings.data_on == "device"
    if not resident and settings.augment_on == "auto" and (device.type == "cuda" or workers > 0):
        in_views, _ = colour_place("auto", workers, device)
        tried.append(("augment_on", "device" if in_views else "workers"))
    if not resident and workers < cores():
        tried.append(("workers", min(max(2 * workers, 1), cores())))
    dtype, native = (choose_dtype(p, device) for p in (settings.precision, "auto"))
    if dtype != native:
        tried.append(("precision", str(native).removeprefix("torch.")))
    elif device.type == "cpu" and dtype == torch.bfloat16:
        tried.append(("precision", "float32"))
    if not resident and not settings.jpeg_draft:
        tried.append(("jpeg_draft", True))
    if not resident and device.type == "cuda":
        tried.append(("data_on", "device"))
    if device.type == "cuda":
        tried += [("step", how) for how in ("eager", "graph", "compiled_graph") if how != settings.step]
    return tried


def time_step(settings: Settings, pipeline: InputPipeline, steps: int) -> StepTime:
    """Mean time of a step as a run takes it, after some to warm up; weights stay.

    Raises UserError where the step cannot be taken so.
    """
    tuning.set_up(settings, pipeline.device)
    dtype = choose_dtype(settings.precision, pipeline.device)
    how_to_step(settings, pipeline.device, dtype, steps)  # refuses a graph where there can be none
    learner = Learner.build(settings, pipeline.device, dtype)
    take = TrainingStep(learner, pipeline.views_by(settings.step), loss_of(settings), settings.step)
    wait = began = 0.0
    loader = pipeline.batches(0, steps + WARM_UP)
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            wait, began = 0.0, _now(pipeline.device)
        asked = time.perf_counter()
        batch = next(loader)
        wait += time.perf_counter() - asked
        take(batch, step, 0.0, settings.ema_momentum)
    return StepTime((_now(pipeline.device) - began) / steps, wait / steps)


def time_parts(settings: Settings, pipeline: InputPipeline, steps: int) -> dict[str, float]:
    """Mean seconds of each part of an eager step after some to warm up, the device waited for after each."""
    device = pipeline.device
    tuning.set_up(settings, device)
    learner = Learner.build(settings, device, choose_dtype(settings.precision, device))
    learner.start()
    loss_of_views = loss_of(settings)
    loader = pipeline.batches(0, steps + WARM_UP)
    seconds = dict.fromkeys(PARTS, 0.0)
    for step in range(steps + WARM_UP):
        marks = [_now(device)]
        batch = next(loader)
        marks.append(_now(device))
        views = pipeline.finished(moved(batch, device))
        marks.append(_now(device))
        embeddings = learner.embed(views)
        marks.append(_now(device))
        loss = loss_of_views(embeddings, step)
        marks.append(_now(device))
        learner.stepper.backward(loss.total)
        marks.append(_now(device))
        learner.stepper.update(0.0)  # the weights stay
        learner.update_target(1 - settings.ema_momentum)
        marks.append(_now(device))
        if step >= WARM_UP:
            for part, a, b in zip(PARTS, marks, marks[1:]):
                seconds[part] += (b - a) / steps
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


def matmul_flops_per_s(precision: str, device: torch.device) -> float:
    """What a large matrix product reaches here: the peak that the step is held against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=choose_dtype(precision, device))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    best = float("inf")
    for _ in range(5):
        start = _now(device)
        a @ a
        best = min(best, _now(device) - start)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * n**3 / best
