"""One training step after another: called, with compiled kernels, or replayed as one CUDA graph."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.common.process_group import world_size
from pretrain.learner import Learner
from pretrain.loss import CAPTURABLE, Loss
from pretrain.objectives.intl import INTLLoss
from pretrain.objectives.views import ObjectiveLoss
from pretrain.settings import Settings
from pretrain.views.batch import each_tensor, moved, tensors_in

logger = logging.getLogger(__name__)

COMPILING_PAYS = 10_000  # steps: of a ResNet-18 on an H100, 20 s of compiling for 2.4 ms less a step
WARM_UPS = 3  # before a capture: libraries choose their kernels
AHEAD = 4  # steps the host may be ahead: more would delay signals and hold more batches


Result = TypeVar("Result")


class Taken(NamedTuple):
    """What a step leaves to look at, until the next is taken."""

    loss: INTLLoss | ObjectiveLoss
    embedding: Tensor
    """Of the last view, n x D."""


class TrainingStep:
    """Views, embeddings, loss, gradients and update; `views_of` makes a batch on the device to views."""

    def __init__(
        self, learner: Learner, views_of: Callable[[Any], list[Tensor]], loss_of_views: Loss, how: str
    ) -> None:
        """`how`: eager, compiled, graph or compiled_graph. All ranks must call.

        A graph replays what was captured at the first call: every batch must have its shapes.
        """
        self.learner, self.views_of, self.loss_of_views = learner, views_of, loss_of_views
        self._graphed = how.endswith("graph")
        if how == "compiled_graph":
            self.loss_of_views = torch.compile(loss_of_views, dynamic=False)
        learner.start(compiled=how.startswith("compiled"))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._under_way: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Any, step: int, lr: float, ema_momentum: float) -> Taken:
        """Take step `step` with a batch from wherever it lies. Raises RunFailed for a loss that cannot be."""
        share = 1 - ema_momentum  # here, in float64: towards the end it is less than float32's epsilon
        if not self._graphed:
            return self._take(moved(batch, self.learner.device), step, lr, share)
        if self._graph is None:
            self._graph = self._captured(moved(batch, self.learner.device), step)
        for kept, new in zip(self._inputs, tensors_in(batch), strict=True):
            kept.copy_(new, non_blocking=True)
        self._lr.fill_(lr)
        self._share.fill_(share)
        self._graph.replay()
        self._wait_for_earlier()
        return self._taken

    def _take(self, batch: Any, step: int, lr: float | Tensor, share: float | Tensor) -> Taken:
        self.learner.update_target(share)
        embeddings = self.learner.embed(self.views_of(batch))
        loss = self.loss_of_views(embeddings, step)
        self.learner.stepper.backward(loss.total)
        self.learner.stepper.update(lr)
        return Taken(loss, embeddings[-1].detach())

    def _captured(self, batch: Any, step: int) -> torch.cuda.CUDAGraph:
        static = each_tensor(batch, torch.clone)
        self._inputs = tensors_in(static)
        self._lr, self._share = (torch.zeros((), device=self.learner.device) for _ in range(2))
        graph, self._taken = captured(
            lambda: self._take(static, step, self._lr, self._share), around_warm_up=self.learner.unchanged()
        )
        return graph

    def _wait_for_earlier(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._under_way.append(event)
        if len(self._under_way) > AHEAD:
            self._under_way.popleft().synchronize()


def captured(
    step: Callable[[], Result], *, around_warm_up: AbstractContextManager[None] | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The step as one CUDA graph, and what each replay fills anew; the capture itself takes no step.

    Some calls within `around_warm_up` come first. Nothing of theirs may be held: what autograd keeps of them
    belongs to another stream.
    """
    with around_warm_up or nullcontext():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # The loader's thread pins memory meanwhile, which a capture of all threads would not survive.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph, result


def how_to_step(settings: Settings, device: torch.device, dtype: torch.dtype, steps: int) -> tuple[str, str]:
    """--step without "auto", and why. Raises UserError for a graph where none can be captured."""
    against = _against_a_graph(settings, device, dtype)
    if settings.step.startswith("compiled") and (lacking := _lacking_to_compile(device)):
        raise UserError(f"--step {settings.step}: {lacking}; take --step eager, or on one GPU graph")
    if settings.step != "auto":
        if settings.step.endswith("graph") and against:
            raise UserError(f"--step {settings.step}: {against}; take --step eager")
        return settings.step, "as asked for"
    if against:
        return "eager", against
    if settings.deterministic:
        return "graph", "compiling may choose other kernels another time, which --deterministic rules out"
    if steps < COMPILING_PAYS:
        return "graph", f"{steps:,} steps, and compiling pays from {COMPILING_PAYS:,} on"
    if lacking := _lacking_to_compile(device):
        return "graph", lacking
    return "compiled_graph", f"compiling pays for {steps:,} steps"


def still_possible(
    settings: Settings, asked: Settings, device: torch.device, dtype: torch.dtype, steps: int
) -> Settings:
    """The settings of a run that goes on, `asked` as they were given, with a step that can be taken here.

    Raises UserError where one was asked for that cannot.
    """
    try:
        how_to_step(settings, device, dtype, steps)
        return settings
    except UserError as error:
        if asked.step != "auto":
            raise
        step, why = how_to_step(asked, device, dtype, steps)
        logger.info("%s, where the run was begun; going on with --step %s: %s", error, step, why)
        return dataclasses.replace(settings, step=step)  # type: ignore[arg-type]


def _lacking_to_compile(device: torch.device) -> str | None:
    """What torch.compile would miss: it builds C++ for a CPU, and a C module for Triton on a GPU."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "compiling needs a C compiler, and there is none"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "compiling needs Python.h (Debian's python3-dev), which is not there"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "compiling for a GPU needs Triton, which is not installed"
    return None


def _against_a_graph(settings: Settings, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "a graph needs a GPU"
    if world_size() > 1:
        return f"{world_size()} ranks share each step, and a graph is one GPU's"
    if dtype == torch.float16:
        return "float16 scales its gradients by what the GPU found"
    if settings.loss_name not in CAPTURABLE:
        return f"{settings.method}'s loss cannot be captured"
    return None
