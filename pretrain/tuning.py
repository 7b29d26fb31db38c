"""Settings left to the machine: precision, threads, how a step runs, where the images lie.

On a CPU the fastest precision and number of threads are timed on a few batches.

What is chosen is written into the run's config.yaml and checkpoint and is not timed again when the run goes
on: sums of another precision, or shared among other threads, differ in their last bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.common.process_group import world_size
from pretrain.common.progress import counted
from pretrain.input_pipeline import InputPipeline
from pretrain.learner import Learner, choose_dtype
from pretrain.settings import Settings, recorded
from pretrain.training_step import how_to_step
from pretrain.views.batch import moved

logger = logging.getLogger(__name__)

LEFT_TO_THE_MACHINE = ("precision", "threads", "step", "data_on")
IMAGES = 64  # of a timed step
STEPS_S = 1.5  # of timed steps for each choice, at least two of them
LIMIT_S = 45.0  # no further choice is looked at after so long
ENOUGH = 0.9
"""One thread is taken where it has this share of the speed of all: where another process wants a core, one
thread shares it, and several wait at every barrier for the one that was put off."""


def taken_over(settings: Settings, saved: Mapping[str, Any]) -> Settings:
    """The settings with what the run, whose saved configuration this is, chose when it began."""
    before = recorded(saved)
    left = {k: before[k] for k in LEFT_TO_THE_MACHINE if getattr(settings, k) == "auto" and k in before}
    return dataclasses.replace(settings, **left)


def chosen(settings: Settings, device: torch.device, pipeline: InputPipeline, steps: int) -> Settings:
    """The settings of a run of so many steps without "auto": on a CPU the fastest choice.

    On a GPU, and where several ranks share a step, nothing is timed: bfloat16 where the device has it, as
    many threads as torch has. `pipeline` is the run's own.
    """
    native = str(choose_dtype("auto", device)).removeprefix("torch.")
    every: dict[str, list[Any]] = {
        "precision": list(dict.fromkeys([native, "float32"])),
        "threads": list(dict.fromkeys([torch.get_num_threads(), 1])),
    }
    asked = {k: v for k, v in every.items() if getattr(settings, k) == "auto"}
    if device.type != "cpu" or world_size() > 1:
        asked = {k: v[:1] for k, v in asked.items()} | ({"threads": [None]} if "threads" in asked else {})
    settings = dataclasses.replace(settings, data_on="host" if pipeline.resident is None else "device")
    trials = [
        dataclasses.replace(settings, **dict(zip(asked, v))) for v in itertools.product(*asked.values())
    ]
    best = trials[0] if len(trials) == 1 else _fastest(trials, views_to_time(pipeline, IMAGES))
    step, why = how_to_step(best, device, choose_dtype(best.precision, device), steps)
    if device.type != "cpu":
        logger.info("--step %s: %s", step, why)
    return dataclasses.replace(best, step=step)  # type: ignore[arg-type]


def views_to_time(pipeline: InputPipeline, most: int | None = None) -> Iterator[list[Tensor]]:
    """The views of one step after the other, of at most so many images, loaded as a run's are."""
    if most is not None:
        pipeline = dataclasses.replace(pipeline, batch_global=min(most, pipeline.batch_global))
    for batch in pipeline.batches(0, 10_000):
        yield pipeline.finished(moved(batch, pipeline.device))


def _fastest(trials: list[Settings], loader: Iterator[list[Tensor]]) -> Settings:
    began, before = time.monotonic(), torch.get_num_threads()
    costs: list[float] = []
    told = []
    try:
        for trial in trials:
            if costs and time.monotonic() - began > LIMIT_S:
                break
            seconds = seconds_of_a_step(trial, loader)
            costs.append(seconds * (ENOUGH if trial.threads == 1 else 1.0))
            told.append(f"{_words(trial)} {1 / seconds:.2f}")
    finally:
        torch.set_num_threads(before)
    best = trials[costs.index(min(costs))]
    logger.info("timed, in steps of %d images a second: %s; taking %s", IMAGES, "; ".join(told), _words(best))
    return best


def seconds_of_a_step(settings: Settings, loader: Iterator[list[Tensor]]) -> float:
    """Mean seconds of a step of a fresh network, loading included, after one step that does not count.

    The mean square stands for the loss, a small part of a step which may want more images than are timed.
    """
    device = torch.device("cpu")
    set_up(settings, device)
    dtype = choose_dtype(settings.precision, device)
    learner = Learner.build(settings, device, dtype)
    learner.start()

    def step() -> None:
        learner.stepper.backward(torch.stack(learner.embed(next(loader))).square().mean())
        learner.stepper.update(0.0)

    step()
    began, count = time.monotonic(), 0
    while count < 2 or time.monotonic() - began < STEPS_S:
        step()
        count += 1
    return (time.monotonic() - began) / count


def set_up(settings: Settings, device: torch.device) -> None:
    """Give the model as many threads as the settings say (where they say nothing it keeps those it has), and
    a GPU's libraries the arithmetic and the freedom of choice that they allow."""
    if isinstance(settings.threads, int):
        torch.set_num_threads(settings.threads)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False  # some containers allow it
        torch.backends.cudnn.benchmark = not settings.deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
        torch.use_deterministic_algorithms(settings.deterministic)


def _words(settings: Settings) -> str:
    threads = settings.threads if isinstance(settings.threads, int) else torch.get_num_threads()
    return f"{settings.precision}, {counted(threads, 'thread')}"
