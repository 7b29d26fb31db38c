"""The study's document, study.md, with three SVG pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from pretrain.common.files import atomic_path, write_text
from transfer.correlation import FEWEST, kendall
from transfer.spectrum.diagnosis_pictures import legend_beside

Runs = list[dict[str, Any]]

LEAST_STEPS = 100
"""Shorter runs have hardly left the initialisation, where nothing has collapsed yet."""
CONTROLS = ("control", "pixels")
"""Kinds of runs in which nothing is trained."""
EVEN = 0.9
"""Below this evenness eigenvalues are far from equal."""


def write_study(runs: Runs, output: Path, *, title: str) -> Path:
    """Write OUTPUT/study.md beside spectra.svg, curves.svg and knn.svg; returns its path."""
    groups = by_instance(runs)
    _save(_spectra(groups), output / "spectra.svg")
    _save(_curves(groups), output / "curves.svg")
    _save(_knn(groups), output / "knn.svg")
    write_text(output / "study.md", statement(groups, title=title))
    return output / "study.md"


def by_instance(runs: Runs) -> dict[str, Runs]:
    """The runs of each transformation, by its name, in order of appearance."""
    groups: dict[str, Runs] = {}
    for run in runs:
        groups.setdefault(run["instance"], []).append(run)
    return groups


def statement(groups: dict[str, Runs], *, title: str) -> str:
    """What was measured, which instances avoided collapse, and where that differs from the paper."""
    lines = [
        f"# Spectrum study: {title}", "",
        "Means over seeds, with the standard deviation where there are several. Objectives have their "
        "gradient clipped to length 1. Of the last logged batch: "
        "condition number of the column-centred covariance (median), RankMe, and evenness: the entropy rank "
        "of the covariance's spectrum as a share of what is possible (1: all eigenvalues equal). The loss is "
        "that above its floor, which INTL's penalty has.", "",
        "| trained with | runs | collapsed or diverged | loss − floor | condition number | RankMe "
        "| evenness before | evenness after | 20-NN top-1 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, runs in groups.items():
        logged = [r for r in runs if r["log"]]
        conditions = [r["log"][-1]["condition_number"] for r in logged]
        lines.append(
            f"| {name} | {len(runs)} | {sum(_failed(r) for r in runs)} "
            f"| {_mean([_above_floor(r['log'][-1], r) for r in logged if r['floor'] is not None])} "
            f"| {f'{statistics.median(conditions):.2g}' if conditions else '–'} "
            f"| {_mean([r['log'][-1]['rankme'] for r in logged])} "
            f"| {_mean(_evenness_of(runs, 'eigenvalues'))} | {_mean(_evenness_of(runs, 'transformed'))} "
            f"| {_mean([r['knn_top1'] for r in runs if r['knn_top1'] is not None])} |"
        )
    lines += [
        "",
        *_findings(groups),
        *_beside_controls(groups),
        "",
        *_failures(groups),
        *_predictions(groups),
        "",
    ]
    lines += ["![spectra](spectra.svg)", "", "![curves](curves.svg)", "", "![k-NN](knn.svg)"]
    return "\n".join(lines) + "\n"


def _findings(groups: dict[str, Runs]) -> list[str]:
    """The paper's claims beside what these runs say."""
    ends = [r["log"][-1]["step"] for runs in groups.values() for r in runs if r["log"] and not r["diverged"]]
    steps = max(ends, default=LEAST_STEPS)
    if steps < LEAST_STEPS:
        return [
            f"- Too short to judge: after {steps} steps nothing here says which transformation avoids "
            f"collapse, or whether the paper's claims hold. Take at least {LEAST_STEPS} steps."
        ]
    trained = [name for name, runs in groups.items() if runs[0]["kind"] not in CONTROLS]
    safe = [name for name in trained if not any(_failed(r) for r in groups[name])]
    lost = [name for name in trained if name not in safe]
    lines = [
        f"- Avoided collapse in all seeds: {', '.join(safe) or 'none'}.",
        f"- Collapsed or diverged in at least one seed: {', '.join(lost) or 'none'}.",
    ]
    expected = {"none": False, "hard whitening": True, "λ^-1": False, "INTL": True}
    differ = [
        f"{name} {_outcome(groups[name])}"
        for name, avoids in expected.items()
        if name in groups and (name in safe) != avoids
    ]
    lines.append(
        "- The paper: hard whitening, λ^-0.5, and INTL avoid collapse; powers far from 1/2 (none, λ^-1) do "
        "not. " + (f"Here it differs: {'; '.join(differ)}." if differ else "These runs agree.")
    )
    others = [n for n, runs in groups.items() if runs[0]["kind"] == "power" and n not in expected]
    if others:
        told = "; ".join(f"{name} {_outcome(groups[name])}" for name in others)
        lines.append(
            "- Of powers near 1/2 the paper says that they avoid collapse too, without a boundary that could "
            f"be checked. Here, without a verdict: {told}."
        )
    return [*lines, *_evenness_finding(groups, steps)]


def _beside_controls(groups: dict[str, Runs]) -> list[str]:
    """Whether training was of use: 20-NN beside that of the same network untrained, and of the pixels."""
    top1 = {n: _top1(runs) for n, runs in groups.items()}
    control = [n for n in groups if groups[n][0]["kind"] == "control" and top1[n]]
    if not control:
        return []
    least = statistics.mean(top1[control[0]])
    below = [
        n for n in groups
        if groups[n][0]["kind"] not in CONTROLS and top1[n] and statistics.mean(top1[n]) <= least
    ]  # fmt: skip
    told = "; ".join(
        f"{n} {_mean(top1[n])} %" for n in groups if groups[n][0]["kind"] in CONTROLS and top1[n]
    )
    return [f"- 20-NN without training: {told}. Not above the random control: {', '.join(below) or 'none'}."]


def _predictions(groups: dict[str, Runs]) -> list[str]:
    """Kendall's τ between the metrics of the features' spectrum and 20-NN, over what was trained."""
    trained = [
        [r for r in runs if r["knn_top1"] is not None]
        for runs in groups.values() if runs[0]["kind"] not in CONTROLS
    ]  # fmt: skip
    trained = [runs for runs in trained if runs]
    names = dict.fromkeys(name for runs in trained for r in runs for name in r.get("spectrum", {}))
    if len(trained) < FEWEST:
        return [f"{len(trained)} ways to train: too few to say whether a spectrum predicts 20-NN."]
    lines = [
        "Does the spectrum of the backbone's features predict 20-NN? Kendall's τ over the ways to train, "
        "each the mean over its seeds, with a 95 % interval.", "",
        "| metric | n | τ | interval |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in names:
        both = [
            (statistics.mean([r["spectrum"][name] for r in runs]), statistics.mean(_top1(runs)))
            for runs in trained if all(name in r["spectrum"] for r in runs)
        ]  # fmt: skip
        tau, low, high = kendall(*zip(*both)) if both else (None, 0.0, 0.0)
        told = f"{tau:.2f} | {low:.2f} to {high:.2f}" if tau is not None else "– | too few"
        lines.append(f"| {name.replace('_', ' ')} | {len(both)} | {told} |")
    return [*lines, ""]


def _top1(runs: Runs) -> list[float]:
    return [r["knn_top1"] for r in runs if r["knn_top1"] is not None]


def _outcome(runs: Runs) -> str:
    return "did not avoid collapse" if any(_failed(r) for r in runs) else "avoided collapse"


def _evenness_finding(groups: dict[str, Runs], steps: int) -> list[str]:
    """INTL's spectrum beside that of IterNorm alone with as many iterations."""
    alone = "IterNorm T=4"
    even = {
        name: [statistics.mean(_evenness_of(groups[name], key)) for key in ("eigenvalues", "transformed")]
        for name in ("INTL", alone)
        if any(r["log"] for r in groups.get(name, []))
    }
    if len(even) < 2:
        return []
    measured = "; ".join(
        f"{name} {before:.3f} and {after:.3f}"
        + (" (collapsed or diverged)" if any(_failed(r) for r in groups[name]) else "")
        for name, (before, after) in even.items()
    )
    reached = even["INTL"][1]
    finding = f"INTL's is {'more' if reached > even[alone][1] else 'no more'} even than IterNorm's"
    if reached < EVEN:
        finding += f", and far from equal eigenvalues after {steps} steps"
    return [
        "- The paper: IterNorm alone leaves the spectrum uneven, INTL's tends to equal eigenvalues. Evenness "
        f"before and after the transformation: {measured}. After it {finding}."
    ]


def _failures(groups: dict[str, Runs]) -> list[str]:
    told = [
        f"- {r['instance']}, seed {r['seed']}: {r['verdict']}"
        for rs in groups.values()
        for r in rs
        if _failed(r)
    ]
    return ["What failed:", "", *told, ""] if told else []


def _failed(run: dict[str, Any]) -> bool:
    return run["verdict"] is not None


def _above_floor(entry: dict[str, Any], run: dict[str, Any]) -> float:
    return entry["loss"] - (run["floor"] or 0.0)


def _evenness_of(runs: Runs, key: str) -> list[float]:
    """Of the last logged batch of each run that logged any."""
    return [_evenness(r["log"][-1][key], r) for r in runs if r["log"] and key in r["log"][-1]]


def _evenness(eigenvalues: list[float], run: dict[str, Any]) -> float:
    """exp of the entropy of λ / Σ λ over the number of eigenvalues that can be positive, from the largest."""
    import numpy as np

    share = np.clip(np.array(eigenvalues[: run["possible_rank"]]), 0, None)  # those behind are rounding
    if not np.isfinite(share).all() or share.sum() == 0:
        return 0.0
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()) / run["possible_rank"])


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def _spectra(groups: dict[str, Runs]) -> Figure:
    """Eigenvalues as shares of their sum, over training: one panel an instance, seed 0, light to dark."""
    groups = {name: runs for name, runs in groups.items() if runs[0]["kind"] != "pixels"}
    columns = 4
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (name, runs) in zip(axes.flat, groups.items()):
        log = runs[0]["log"]
        for i, entry in enumerate(log):
            shares = [max(v, 1e-9) for v in entry["eigenvalues"]]
            axis.semilogy(
                range(1, len(shares) + 1), shares, color=plt.cm.viridis_r(i / max(len(log) - 1, 1)), lw=1
            )  # type: ignore[attr-defined]
        axis.set_title(name, fontsize=9)
        axis.set_yscale("log")  # also where nothing was logged: the panels share their axis
        axis.set_ylim(1e-9, 1)
    figure.supxlabel("eigenvalue, from the largest")
    figure.supylabel("share of the sum (light: start, dark: end)")
    figure.tight_layout()
    return figure


def _curves(groups: dict[str, Runs]) -> Figure:
    """Loss, condition number and RankMe over training, seed 0."""
    figure, axes = plt.subplots(1, 3, figsize=(15.5, 4), layout="constrained")
    for axis, (key, label) in zip(
        axes, (("loss", "loss − floor"), ("condition_number", "condition number"), ("rankme", "RankMe"))
    ):
        for i, (name, runs) in enumerate(groups.items()):
            log = runs[0]["log"] if runs[0]["floor"] is not None or key != "loss" else []  # another scale
            values = [_above_floor(e, runs[0]) if key == "loss" else e[key] for e in log]
            colour = plt.cm.tab20(i % 20)  # type: ignore[attr-defined]
            axis.plot([e["step"] for e in log], values, "-" if i < 20 else "--", label=name, color=colour)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        if key == "condition_number":
            axis.set_yscale("log")
    legend_beside(axes[-1])
    return figure


def _knn(groups: dict[str, Runs]) -> Figure:
    """20-NN top-1 of every run, and the mean; a cross where the run collapsed or diverged."""
    figure, axis = plt.subplots(figsize=(9, 4))
    for i, runs in enumerate(groups.values()):
        for run in runs:
            if run["knn_top1"] is not None:
                axis.plot(
                    i, run["knn_top1"], "x" if _failed(run) else "o", color="C3" if _failed(run) else "C0"
                )
        values = [r["knn_top1"] for r in runs if r["knn_top1"] is not None]
        if values:
            axis.hlines(statistics.mean(values), i - 0.3, i + 0.3, color="0.4")
    axis.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    axis.set_ylabel("20-NN top-1 % (cross: collapsed)")
    figure.tight_layout()
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as aside:
        figure.savefig(aside, format="svg")
    plt.close(figure)
