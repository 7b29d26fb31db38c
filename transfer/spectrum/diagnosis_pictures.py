"""Pictures of a diagnosis: spectra of all checkpoints and of each one's layers, ranks by number of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.common.files import atomic_path
from transfer.evaluation.pooled_features import STAGES

LAYERS = dict(zip(STAGES, ("res2", "res3", "res4", "res5")))
"""The stages as detectron2 calls them."""
LEAST_SHARE = 1e-12
"""Smaller shares are rounding, and off the plots."""


def draw(spectra: Mapping[str, Any], folder: Path) -> None:
    """Write spectra.svg, images.svg and, where there are several layers, layers.svg into `folder`."""
    found = sorted(spectra.values(), key=lambda s: (s["step"], s["name"]))
    folder.mkdir(exist_ok=True)
    _save(_all(found), folder / "spectra.svg")
    _save(_by_images(found), folder / "images.svg")
    several = [s for s in found if len(s["layers"]) > 1]
    if several:
        _save(_layers(several), folder / "layers.svg")


def _all(found: list[dict[str, Any]]) -> Figure:
    """The output's spectrum of every checkpoint on one log-log plot; by training step where they have one."""
    figure, axis = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for i, one in enumerate(found):
        _line(axis, [*one["layers"].values()][-1], _label(one, found), i / max(len(found) - 1, 1))
    legend_beside(axis)
    return figure


def _layers(found: list[dict[str, Any]]) -> Figure:
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 0.8, 3.6 * rows), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, one in zip(axes.flat, found):
        for i, (stage, values) in enumerate(one["layers"].items()):
            _line(axis, values, LAYERS.get(stage, stage), i / max(len(one["layers"]) - 1, 1))
        axis.set_title(one["name"], fontsize=8)
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
    legend_beside(axes.flat[0])
    return figure


def _by_images(found: list[dict[str, Any]]) -> Figure:
    """RankMe by the number of images: it rises until there are several times as many as features."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for i, one in enumerate(found):
        ns = [int(n) for n in one["by_images"]]
        ranks = [m["rankme"] for m in one["by_images"].values()]
        colour = plt.cm.viridis(0.9 * i / max(len(found) - 1, 1))  # type: ignore[attr-defined]
        axis.plot(ns, ranks, "o-", ms=3, label=_label(one, found), color=colour)
    axis.set_xscale("log")
    ticks = sorted({n for one in found for n in map(int, one["by_images"])})
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("images")
    axis.set_ylabel("RankMe")
    legend_beside(axis)
    return figure


def legend_beside(axis: Axes) -> None:
    """The legend of `axis` to the right of all axes, where it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles, labels, loc="outside right upper", fontsize=7)  # type: ignore[union-attr]


def _line(axis: Axes, eigenvalues: list[float], label: str, place: float) -> None:
    total = sum(eigenvalues) or 1.0
    shares = [v / total for v in eigenvalues if v / total > LEAST_SHARE]
    colour = plt.cm.viridis(0.9 * place)  # type: ignore[attr-defined]
    axis.loglog(range(1, len(shares) + 1), shares, label=label, color=colour, lw=1.2)
    axis.set_xlabel("eigenvalue, from the largest")
    axis.set_ylabel("share of the sum")


def _label(one: dict[str, Any], found: list[dict[str, Any]]) -> str:
    steps = len({s["step"] for s in found}) > 1
    return f"{one['name']}, step {one['step']:,}" if steps and one["step"] else one["name"]


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as aside, plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(aside, format="svg")
    plt.close(figure)
