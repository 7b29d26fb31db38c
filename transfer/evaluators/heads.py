"""A whole grid of linear heads, trained together on one batch of features at a time.

H heads, B images, D features, C classes. Heads differ in learning rate, weight decay and the features they
see, share each batch (and, of one width, their initial values), and never see each other: head h trains as it
would alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.process_group import is_main
from transfer.evaluation.protocol import want

Optimizer = Literal["sgd", "lars", "lars_weights", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "cosine_by_epoch", "steps", "exponential"]
NORM_EPSILON = 1e-6  # MAE's main_linprobe.py
LARS_TRUST = 0.001  # SimSiam's main_lincls.py with apex's LARC(clip=False)


class _Stepped(Protocol):
    """The values of a protocol that trains by gradient steps."""

    @property
    def epochs(self) -> int: ...
    @property
    def milestones(self) -> tuple[int, ...]: ...
    @property
    def gamma(self) -> float: ...
    @property
    def momentum(self) -> float: ...


def check_steps(values: _Stepped) -> None:
    """Raises ValueError for numbers out of range."""
    want(values.epochs >= 1, "epochs", values.epochs, "1 or more")
    rising = list(values.milestones) == sorted({m for m in values.milestones if m >= 1})
    want(rising, "milestones", values.milestones, "rising epochs, each 1 or more")
    want(0 < values.gamma <= 1, "gamma", values.gamma, "above 0, at most 1")
    want(0 <= values.momentum < 1, "momentum", values.momentum, "0 to below 1")


def rate_factor(
    schedule: Schedule,
    *,
    step: int,
    steps_per_epoch: int,
    epochs: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    final: float = 0.0,
    warmup_epochs: int = 0,
) -> float:
    """The learning rate at `step` as a share of the first one, which a linear warm-up from 0 comes to.

    cosine: final + (1 - final)(1 + cos(pi t)) / 2 with t by step, or by whole epoch; steps: times `gamma`
    at each milestone epoch; exponential: final ** (epoch / epochs).
    """
    if step < warmup_epochs * steps_per_epoch:
        return step / (warmup_epochs * steps_per_epoch)
    step, epochs = step - warmup_epochs * steps_per_epoch, epochs - warmup_epochs
    epoch = step // steps_per_epoch
    if schedule == "constant":
        return 1.0
    if schedule == "steps":
        return gamma ** sum(epoch >= m for m in milestones)
    if schedule == "exponential":
        return final ** (epoch / epochs)
    t = epoch / epochs if schedule == "cosine_by_epoch" else step / (steps_per_epoch * epochs)
    return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2


class HeadGrid:
    """Weights W (D x H x C), biases b (1 x H x C) and their optimiser's state.

    The gradient of the mean cross entropy is written out, dL/dW_h = x^T (softmax(x W_h + b_h) - y) / B: one
    product serves all heads and nothing flows into the features.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        rates: Sequence[float],
        decays: Sequence[float],
        optimizer: Optimizer = "sgd",
        momentum: float = 0.9,
        init: Literal["normal", "uniform"] = "normal",
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.grid = [(r, d) for r in rates for d in decays]
        self.optimizer, self.momentum, self.steps = optimizer, momentum, 0
        generator = torch.Generator().manual_seed(seed)
        if init == "normal":  # MoCo and those after it: N(0, 0.01), bias 0
            weight = torch.randn(features, classes, generator=generator) * 0.01
            bias = torch.zeros(classes)
        else:  # torch.nn.Linear's own
            bound = 1 / math.sqrt(features)
            weight = (torch.rand(features, classes, generator=generator) * 2 - 1) * bound
            bias = (torch.rand(classes, generator=generator) * 2 - 1) * bound
        heads = len(self.grid)
        self.parameters = [
            weight.to(device)[:, None].repeat(1, heads, 1),
            bias.to(device)[None, None].repeat(1, heads, 1),
        ]
        slots = 2 if optimizer in ("adam", "adamw") else 1
        self.slots = [[torch.zeros_like(p) for _ in range(slots)] for p in self.parameters]
        self._rates, self._decays = (torch.tensor(v, device=device) for v in zip(*self.grid))

    def __len__(self) -> int:
        return len(self.grid)

    def logits(self, x_BD: Tensor) -> Tensor:
        """B x H x C."""
        weight, bias = self.parameters
        return (x_BD @ weight.flatten(1)).view(-1, *bias.shape[1:]) + bias

    def step(self, x_BD: Tensor, labels_B: Tensor, *, factor: float) -> Tensor:
        """One optimiser step at `factor` times each head's rate; returns the mean loss of each head (H).

        The batch is this rank's share; gradients are those of the mean over all ranks. All ranks must call.
        """
        weight, _ = self.parameters
        heads = weight.shape[1]
        count = sum_over_ranks(torch.full((), float(len(labels_B)), device=x_BD.device))
        log_p = self.logits(x_BD).log_softmax(2)
        target = labels_B[:, None, None].expand(-1, heads, 1)
        loss = -log_p.gather(2, target).sum((0, 2))
        delta = log_p.exp()
        delta.scatter_add_(2, target, torch.full_like(delta[:, :, :1], -1.0))
        gradients = [(x_BD.T @ delta.flatten(1)).view_as(weight), delta.sum(0, keepdim=True)]
        gradients = [sum_over_ranks(g) / count for g in gradients]
        self.steps += 1
        rate, decay = self._rates[:, None] * factor, self._decays[:, None]
        for parameter, gradient, slots in zip(self.parameters, gradients, self.slots):
            bias = parameter is self.parameters[1]
            self._update(parameter, gradient, slots, rate, decay, bias=bias)
        return sum_over_ranks(loss) / count

    def _update(
        self, p: Tensor, g: Tensor, slots: list[Tensor], rate: Tensor, decay: Tensor, *, bias: bool
    ) -> None:
        """torch.optim's rules, head by head; lars_weights is MAE's util/lars.py, with SGD for the bias."""
        if self.optimizer in ("sgd", "lars", "lars_weights"):
            if self.optimizer == "lars_weights":
                if not bias:
                    g = g + decay * p
                    g = g * _trust(p, g, torch.zeros_like(decay), epsilon=0.0)
            else:
                g = g + decay * p
            if self.optimizer == "lars":
                g = g * _trust(p, g - decay * p, decay)
            slots[0].mul_(self.momentum).add_(g)
            p.sub_(rate * slots[0])
            return
        if self.optimizer == "adamw":
            p.mul_(1 - rate * decay)
        else:
            g = g + decay * p
        slots[0].lerp_(g, 0.1)
        slots[1].mul_(0.999).addcmul_(g, g, value=0.001)
        mean = slots[0] / (1 - 0.9**self.steps)
        square = slots[1] / (1 - 0.999**self.steps)
        p.sub_(rate * mean / (square.sqrt() + 1e-8))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {"parameters": self.parameters, "slots": self.slots, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take up `state`. Raises ValueError for that of another grid."""
        for mine, theirs in zip(self.parameters, state["parameters"], strict=True):
            if mine.shape != theirs.shape:
                raise ValueError(f"heads of shape {tuple(theirs.shape)}, wanted {tuple(mine.shape)}")
            mine.copy_(theirs)
        for mine_slots, their_slots in zip(self.slots, state["slots"], strict=True):
            for mine, theirs in zip(mine_slots, their_slots, strict=True):
                mine.copy_(theirs)
        self.steps = int(state["steps"])


class HeadGrids:
    """A HeadGrid for each set of features, all fed with the same batches; heads are numbered set by set.

    `sets` has, by a set's name, which columns of x are its features. `options` are HeadGrid's.
    """

    def __init__(
        self,
        sets: Mapping[str, Tensor],
        classes: int,
        *,
        device: torch.device | None = None,
        norm_batch: int | None = None,
        **options: Any,
    ) -> None:
        width = 1 + max(int(index.max()) for index in sets.values())
        self.norm = None if norm_batch is None else FeatureNorm(width, norm_batch, device)
        self._columns = {name: index.to(device) for name, index in sets.items()}
        self.grids = {
            name: HeadGrid(len(index), classes, device=device, **options) for name, index in sets.items()
        }
        self.grid = [(*pair, name) for name, grid in self.grids.items() for pair in grid.grid]

    def __len__(self) -> int:
        return len(self.grid)

    def _each(self, x_BD: Tensor) -> list[tuple[HeadGrid, Tensor]]:
        return [
            (grid, x_BD if len(index) == x_BD.shape[1] else x_BD.index_select(1, index))
            for grid, index in zip(self.grids.values(), self._columns.values())
        ]

    def logits(self, x_BD: Tensor) -> Tensor:
        """B x H x C."""
        x_BD = x_BD if self.norm is None else self.norm.evaluated(x_BD)
        return torch.cat([grid.logits(x) for grid, x in self._each(x_BD)], 1)

    def step(self, x_BD: Tensor, labels_B: Tensor, *, factor: float) -> Tensor:
        """HeadGrid's step in each; the mean loss of every head (H). All ranks must call."""
        x_BD = x_BD if self.norm is None else self.norm.trained(x_BD)
        return torch.cat([grid.step(x, labels_B, factor=factor) for grid, x in self._each(x_BD)])

    def finite(self) -> Tensor:
        """Which heads (H) have weights that are numbers; others have diverged."""
        return torch.cat(
            [
                torch.stack([p.isfinite().all(2).all(0) for p in grid.parameters]).all(0)
                for grid in self.grids.values()
            ]
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        norm = {} if self.norm is None else {"norm": self.norm.running}
        return {name: grid.state() for name, grid in self.grids.items()} | norm

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up `state`. Raises ValueError for that of other sets or another grid."""
        state = dict(state)
        if self.norm is not None:
            for mine, theirs in zip(self.norm.running, state.pop("norm"), strict=True):
                mine.copy_(theirs)
        if list(state) != list(self.grids):
            raise ValueError(f"heads on {', '.join(state)}, wanted {', '.join(self.grids)}")
        for name, grid in self.grids.items():
            grid.load(state[name])


class FeatureNorm:
    """BatchNorm of the features without weight and bias, as MAE's linear probe has it before its head.

    A training batch is normalised in groups of about `images`, each by its own statistics, as by a rank of
    theirs; evaluation takes the running ones (momentum 0.1) of the first group of rank 0.
    """

    def __init__(self, width: int, images: int, device: torch.device | None) -> None:
        self.images = images
        self.running = (torch.zeros(width, device=device), torch.ones(width, device=device))

    def trained(self, x_BD: Tensor) -> Tensor:
        """B x D normalised by the groups' statistics; the running ones are updated. All ranks must call."""
        groups = list(x_BD.chunk(max(1, round(len(x_BD) / self.images))))
        done = []
        for i, group in enumerate(groups):
            mean, var = (r if i == 0 else r.clone() for r in self.running)
            done.append(batch_norm(group, mean, var, training=True, momentum=0.1, eps=NORM_EPSILON))
        for running in self.running:
            running.copy_(sum_over_ranks(running if is_main() else torch.zeros_like(running)))
        return torch.cat(done)

    def evaluated(self, x_BD: Tensor) -> Tensor:
        """B x D normalised by the running statistics."""
        mean, var = self.running
        return batch_norm(x_BD, mean, var, training=False, eps=NORM_EPSILON)


def _trust(p: Tensor, gradient: Tensor, decay: Tensor, epsilon: float = 1e-8) -> Tensor:
    """LARC's factor, one a head: trust |p| / (|g| + decay |p|), 1 where either norm is 0."""
    norm, slope = p.norm(dim=(0, 2), keepdim=True), gradient.norm(dim=(0, 2), keepdim=True)
    ratio = LARS_TRUST * norm / (slope + decay * norm + epsilon)
    return torch.where((norm > 0) & (slope > 0), ratio, torch.ones_like(ratio))
