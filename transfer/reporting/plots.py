"""Curves and figures enter; SVG text leaves, the same for the same input, readable on dark and light."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from transfer.reporting.collect import Evidence, Run
from transfer.reporting.content import costs
from transfer.reporting.methods import Results

INK = "#0a0b0c"
"""Stands for the page's text colour: replaced by currentColor in the SVG."""
COLOURS = ("#3b82f6", "#ea7317", "#16a34a", "#c026d3", "#dc2626", "#0d9488", "#a16207", "#7c7c86")
"""Mid tones with at least 3:1 contrast against both white and the dark page."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "intl-bench", "font.family": "sans-serif", "font.size": 9.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.5, "lines.linewidth": 1.5,
    "legend.frameon": False, "legend.fontsize": 8.0, "axes.titlesize": 9.5, "path.simplify_threshold": 0.4,
}  # fmt: skip
MAX_POINTS = 400
FROM_ZERO = ("learning rate", "images / s", "AP, percent")
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    name: str
    title: str
    svg: str
    """An <svg> element without XML declaration."""


Series = list[tuple[str, Sequence[float], Sequence[float]]]


def draw(name: str, title: str, paint: Callable[[Axes], None]) -> Plot:
    """Let `paint` fill one axes and render it; ids are prefixed with `name`, for one page to hold several."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLOURS)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        paint(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name=name, title=title, svg=_inline(out.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda m: m[1] + name + "-", svg)
    svg = svg.replace(INK, "currentColor")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = re.compile(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"([^>]*)>|<svg ([^>]*)>')
    match = head.match(svg)
    assert match is not None
    attributes = re.sub(r'\b(width|height)="[^"]*"\s*', "", match[0][4:-1]).strip()
    return f'<svg role="img" aria-label="{label}" {attributes}>' + svg[match.end() :]


def _lines(
    axes: Axes, series: Series, *, x: str, y: str, log: bool = False, marker: str | None = None
) -> None:
    labels = list(dict.fromkeys(label for label, _, _ in series))
    named: set[str] = set()
    for label, xs, ys in series:  # seeds of one method share its colour and its line in the legend
        step = max(1, math.ceil(len(xs) / MAX_POINTS))
        few = marker or ("o" if len(xs) < 3 else None)
        shown = None if label in named or labels == [""] else label
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        axes.plot(xs[::step], ys[::step], label=shown, color=colour, marker=few, markersize=3.5)
        named.add(label)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if y in FROM_ZERO:
        axes.set_ylim(bottom=0)
    if log and all(v > 0 for _, _, ys in series for v in ys):
        axes.set_yscale("log")


def _curve(run: Run, x: str, y: str) -> tuple[list[float], list[float]]:
    """Points of a run where both are finite numbers."""
    points = [
        (float(row[x]), float(row[y]))
        for row in run.rows
        if isinstance(row.get(x), (int, float))
        and isinstance(row.get(y), (int, float))
        and math.isfinite(row[y])
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _curves(runs: Sequence[Run], x: str, names: dict[str, str]) -> Series:
    """One series a run and quantity; a legend names what differs."""
    series: Series = []
    for run in runs:
        for key, spelt in names.items():
            xs, ys = _curve(run, x, key)
            if xs:
                parts = [run.label] * (len(runs) > 1) + [spelt] * (len(names) > 1)
                series.append((": ".join(parts), xs, ys))
    return series


PRETRAINING_PLOTS: tuple[tuple[str, str, str, dict[str, str], bool], ...] = (
    ("loss", "Pretraining loss", "loss", {
        "loss": "total", "loss_minus_floor": "total − floor", "alignment": "alignment"}, False),
    ("trace", "Trace penalty", "Σ (Ŝᵢᵢ − 1)²", {"trace": "trace"}, True),
    ("lr", "Learning rate", "learning rate", {"lr": "lr"}, False),
    ("condition", "Condition number of the embedding's covariance", "λ max / λ min", {
        "condition_number": "over features",
        "row_condition_number": "over images (what INTL acts on)"}, True),
    ("rank", "Effective rank of the embedding", "rank", {
        "rankme": "RankMe", "stable_rank": "stable rank",
        "row_entropy_rank": "entropy rank over images"}, False),
    ("share", "Share of the largest eigenvalue", "share", {"largest_share": "largest share"}, False),
    ("throughput", "Throughput", "images / s", {"images_per_s": "images / s"}, False),
    ("knn", "k-NN of the running backbone", "top-1, percent", {"knn_top1": "k-NN top-1"}, False),
)  # fmt: skip


def pretraining_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss terms, learning rate, spectrum and effective rank over steps."""
    plots = []
    for name, title, y, names, log in PRETRAINING_PLOTS:
        series = _curves(runs, "step", names)
        if series:
            plots.append(
                draw(
                    f"pretrain-{name}",
                    title,
                    lambda a, s=series, y=y, g=log: _lines(a, s, x="step", y=y, log=g),
                )
            )
    return plots


def detection_plots(runs: Sequence[Run], results: Results) -> list[Plot]:
    """Loss and AP over iterations, AP by object size."""
    plots = []
    for name, title, key in (
        ("loss", "Detection: training loss", "total_loss"),
        ("box", "Detection: box AP", "bbox/AP"),
        ("mask", "Detection: mask AP", "segm/AP"),
        ("lr", "Detection: learning rate", "lr"),
    ):
        series = _curves(runs, "iteration", {key: title})
        if series:
            y = "AP, percent" if key.endswith("AP") else "learning rate" if key == "lr" else "loss"
            plots.append(
                draw(f"detection-{name}", title, lambda a, s=series, y=y: _lines(a, s, x="iteration", y=y))
            )
    for task in results.tasks:
        sizes = [m for m in SIZES if m in results.metrics(task)]
        bars = _bars(results, task, sizes)
        if sizes and bars:
            plots.append(
                draw(
                    f"size-{task.slug}",
                    f"{task.title} AP by object size ({task.dataset}, {task.protocol})",
                    lambda a, b=bars, s=sizes: _bar_groups(a, b, [SIZES[m] for m in s], "AP, percent"),
                )
            )
    return plots


def _bars(results: Results, task: Any, metrics: list[str]) -> dict[str, list[tuple[float, float]]]:
    """(mean, std) of each metric by method; methods without any left out."""
    bars = {}
    for method in results.methods:
        found = [results.headline(method, task, m) for m in metrics]
        if any(s is not None for s in found):
            bars[method] = [(s.mean, s.std or 0.0) if s else (math.nan, 0.0) for s in found]
    return bars


def _bar_groups(axes: Axes, bars: dict[str, list[tuple[float, float]]], names: list[str], y: str) -> None:
    width = 0.8 / len(bars)
    for i, (method, values) in enumerate(bars.items()):
        at = [j + (i - (len(bars) - 1) / 2) * width for j in range(len(names))]
        spread = [v[1] for v in values] if any(v[1] for v in values) else None
        axes.bar(
            at, [v[0] for v in values], width * 0.92, yerr=spread, label=method,
            color=COLOURS[i % len(COLOURS)], ecolor=INK, error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(y)


def classification_plots(results: Results) -> list[Plot]:
    """Accuracy by k, by learning rate of the sweep, by share of labels."""
    plots = []
    for task in results.tasks:
        ks = sorted(int(m[6:]) for m in results.metrics(task) if re.fullmatch(r"top1_k\d+", m))
        if len(ks) > 1:
            series: Series = []
            for method in results.methods:
                found = [(k, s.mean) for k in ks if (s := results.headline(method, task, f"top1_k{k}"))]
                if found:
                    series.append((method, [k for k, _ in found], [v for _, v in found]))

            def paint(axes: Axes, series: Series = series, ks: list[int] = ks) -> None:
                _lines(axes, series, x="k", y="top-1, percent", marker="o")
                axes.set_xscale("log")
                axes.set_xticks(ks, [str(k) for k in ks])
                axes.minorticks_off()

            plots.append(draw(f"by-k-{task.slug}", f"k-NN by k ({task.dataset}, {task.protocol})", paint))
    return plots + _sweep_plots(results) + _label_share_plots(results)


def _sweep_plots(results: Results) -> list[Plot]:
    """One curve a method from `settings.sweep`: a list of {lr, weight_decay, top1}."""
    plots = []
    for task in results.tasks:
        series: Series = []
        for method in results.methods:
            for selection in results.selections(method, task):
                record = results.records(method, task, selection)[0]
                sweep = (record["settings"] or {}).get("sweep") or []
                points = sorted(
                    (float(p["lr"]), float(p["top1"]))
                    for p in sweep
                    if isinstance(p, dict) and {"lr", "top1"} <= set(p)
                )
                if len(points) > 1:
                    best: dict[float, float] = {}
                    for lr, value in points:
                        best[lr] = max(value, best.get(lr, value))
                    series.append((method, list(best), list(best.values())))
                    break
        if series:

            def paint(axes: Axes, series: Series = series) -> None:
                _lines(axes, series, x="learning rate", y="held-out top-1, percent", marker="o")
                axes.set_xscale("log")

            plots.append(
                draw(
                    f"sweep-{task.slug}", f"Linear by learning rate ({task.dataset}, {task.protocol})", paint
                )
            )
    return plots


def _label_share_plots(results: Results) -> list[Plot]:
    by_setting: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for task in results.tasks:
        if task.label_percent is not None:
            by_setting[task.dataset, task.protocol].append(task)
    plots = []
    for (dataset, protocol), tasks in by_setting.items():
        series: Series = []
        for method in results.methods:
            found = [
                (t.label_percent, s.mean) for t in tasks if (s := results.headline(method, t)) is not None
            ]
            if found:
                series.append((method, [p for p, _ in found], [v for _, v in found]))
        shares = sorted({x for _, xs, _ in series for x in xs})

        def paint(axes: Axes, series: Series = series, shares: list[float] = shares) -> None:
            _lines(axes, series, x="share of the labels, percent", y="top-1, percent", marker="o")
            axes.set_xscale("log")
            axes.set_xticks(shares, [f"{s:g}" for s in shares])
            axes.minorticks_off()

        slug = f"labels-{dataset}-{protocol.replace('@', '-v')}"
        plots.append(draw(slug, f"Fine-tuning by share of labels ({dataset}, {protocol})", paint))
    return plots


def cost_plots(evidence: Evidence) -> list[Plot]:
    """Wall time by task, summed over what was run."""
    found = costs(evidence)
    if found is None:
        return []
    names = [c.text for c in found.columns]
    seconds: dict[str, float] = defaultdict(float)
    for row in found.rows:
        seconds[row[names.index("task")].text] += float(row[names.index("seconds")].text)

    def paint(axes: Axes) -> None:
        axes.barh(list(seconds), [s / 60 for s in seconds.values()], color=COLOURS[0])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("minutes, all runs of the task")

    return [draw("wall-time", "Wall time by task", paint)]
