"""A run's losses and diagnoses as JSON lines, TensorBoard files and, on request, W&B charts."""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.common.errors import RunFailed
from pretrain.common.files import append_jsonl, read_jsonl, write_text
from pretrain.common.process_group import is_main
from pretrain.objectives.intl import INTLLoss
from pretrain.objectives.views import ObjectiveLoss


class LossLog:
    """The loss terms of the steps since the last line, kept on the device so that no step waits for them."""

    def __init__(self, earlier: Sequence[Sequence[float]] = ()) -> None:
        """`earlier`: what `check` gave when the run was saved, so that its next line is the same."""
        self._checked = [list(terms) for terms in earlier]
        self._terms: list[Tensor] = []
        self._steps: list[int] = []
        self._lrs: list[float] = []
        self._names: tuple[str, ...] = ("total", "alignment", "penalty")
        self._noted, self._since = 0, time.monotonic()

    def note(self, step: int, terms: INTLLoss | ObjectiveLoss, lr: float) -> None:
        """Remember the total, the alignment and the trace or penalty of a step."""
        self._names = terms._fields
        self._terms.append(torch.stack([t.detach() for t in terms]))
        self._steps.append(step)
        self._lrs.append(lr)
        self._noted += 1

    def check(self) -> list[list[float]]:
        """The terms of all steps since the last means. Raises RunFailed if a loss was not finite."""
        terms = torch.stack(self._terms).cpu().double().tolist() if self._terms else []
        for step, values, lr in zip(self._steps, terms, self._lrs):
            if not math.isfinite(values[0]):
                said = ", ".join(f"{name} {value}" for name, value in zip(self._names, values))
                raise RunFailed(
                    f"the loss is not finite at step {step}: {said}, learning rate {lr:.4g}; what was saved "
                    "before is kept. Lower --lr, "
                    "lengthen --warmup-epochs or take --precision float32"
                )
        self._checked += terms
        self._terms, self._steps, self._lrs = [], [], []
        return self._checked

    def take(self) -> dict[str, float]:
        """Means since the last call and steps per second. Raises RunFailed if a loss was not finite."""
        mean = torch.tensor(self.check(), dtype=torch.float64).mean(0).tolist()
        now = time.monotonic()
        names = ("loss", *self._names[1:])
        out = dict(zip(names, mean), steps_per_s=self._noted / (now - self._since))
        self._checked, self._noted, self._since = [], 0, now
        return out


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/`; later lines than step `start` are dropped."""

    def __init__(self, output: Path, *, start: int, wandb: str | None, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = output / "metrics.jsonl"
        earlier = read_jsonl(self._file)
        kept = [r for r in earlier if r.get("step", 0) <= start]
        if len(kept) < len(earlier):
            write_text(self._file, "".join(json.dumps(r) + "\n" for r in kept))
        self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
        self._wandb = start_wandb(wandb, output, start, config) if wandb else None

    def write(self, record: Mapping[str, float]) -> None:
        """One line; numbers that are not finite are left out."""
        finite = {k: v for k, v in record.items() if math.isfinite(v)}
        append_jsonl(self._file, finite)
        for key, value in finite.items():
            if key not in ("step", "epoch"):
                self._tensorboard.add_scalar(key, value, int(record["step"]))
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=int(record["step"]))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


@contextlib.contextmanager
def wandb_log(
    project: str | None, output: Path, start: int, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A function that logs values at a step to W&B; without `project`, or on other ranks, it does nothing.

    The run in `output` goes on where `start` > 0, and is finished however the block ends.
    """
    if project is None or not is_main():
        yield lambda values, step: None
        return
    run = start_wandb(project, output, start, config)
    failed = True
    try:
        yield lambda values, step: run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def start_wandb(project: str, output: Path, start: int, config: Mapping[str, Any]) -> Any:
    """The W&B run of the training in `output`: the earlier one where it goes on, `start` > 0."""
    import wandb

    # A continued run finds its own again; one begun anew is another, for W&B drops steps below the last.
    kept = output / "wandb_id"
    if start == 0 or not kept.exists():
        write_text(kept, uuid.uuid4().hex[:16] + "\n")
    place = output.resolve()
    return wandb.init(
        project=project,
        name=f"{place.parent.name}/{place.name}",  # every suite's run lies in a folder named pretrain
        id=kept.read_text().strip(),
        resume="allow",
        dir=str(output),
        config=dict(config),
    )
