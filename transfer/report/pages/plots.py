"""Plots as SVG text, the same for the same input, readable on dark and light."""

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

from pretrain.common.files import file_name
from pretrain.data.transfer_sets import metric_of
from transfer.report.evidence.collect import Curve, Evidence
from transfer.report.evidence.grouping import Results, Task, metric_name
from transfer.report.pages.inventory import costs

INK = "#0a0b0c"
"""Stands for the page's text colour: replaced by currentColor in the SVG."""
COLOURS = ("#3b82f6", "#ea7317", "#16a34a", "#c026d3", "#dc2626", "#0d9488", "#a16207", "#7c7c86")
"""Mid tones with at least 3:1 contrast against both white and the dark page."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "intl-bench", "font.family": "sans-serif", "font.size": 9.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.5, "lines.linewidth": 1.5,
    "legend.frameon": False, "legend.fontsize": 8.0, "axes.titlesize": 9.5, "path.simplify_threshold": 0.4,
}  # fmt: skip
WIDTH, HEIGHT = 4.4, 3.0  # inches, without the legend
LEGEND_LETTERS = 66  # in a line of the legend, a label's line and margins taken as 8
MAX_POINTS = 400
MOST_LABELS = 40  # lines or bars: more cannot be told apart
FROM_ZERO = ("learning rate", "images / s", "AP, percent")
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing that can stand in a page or be a file of its own."""

    name: str
    title: str
    svg: str
    """An <svg> element without XML declaration."""


Series = list[tuple[str, Sequence[float], Sequence[float]]]


def draw(name: str, title: str, paint: Callable[..., None], *values: Any, **options: Any) -> Plot:
    """Let `paint(axes, ...)` fill one axes and render it; ids get `name` as prefix, to share a page."""
    name = file_name(name)
    first, *rest = values
    labels = list(dict.fromkeys(first if isinstance(first, dict) else (label for label, _, _ in first)))
    if len(labels) > MOST_LABELS:
        kept = set(labels[:MOST_LABELS])
        few = (
            {k: first[k] for k in labels if k in kept}
            if isinstance(first, dict)
            else [s for s in first if s[0] in kept]
        )
        values, title = (few, *rest), f"{title}: the first {MOST_LABELS} of {len(labels)}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLOURS)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        paint(axes, *values, **options)
        if labels := axes.get_legend_handles_labels()[1]:  # above the axes, where it covers no line
            columns = max(1, min(len(labels), LEGEND_LETTERS // (max(map(len, labels)) + 8)))
            figure.set_size_inches(WIDTH, HEIGHT + 0.17 * math.ceil(len(labels) / columns))
            figure.legend(loc="outside upper left", ncols=columns)
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


def lines(
    axes: Axes, series: Series, *, x: str, y: str, log: bool = False, marker: str | None = None
) -> None:
    """Paint one line a series; of one name in one colour, with one line in the legend."""
    labels = list(dict.fromkeys(label for label, _, _ in series))
    named: set[str] = set()
    for label, xs, ys in series:
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
    values = [v for _, _, ys in series for v in ys]
    if log and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")


def _curve(run: Curve, x: str, y: str) -> tuple[list[float], list[float]]:
    """Points of a run where both are finite numbers."""
    points = [
        (float(row[x]), float(row[y]))
        for row in run.rows
        if isinstance(row.get(x), (int, float))
        and isinstance(row.get(y), (int, float))
        and math.isfinite(row[y])
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _curves(runs: Sequence[Curve], x: str, names: dict[str, str]) -> Series:
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
        "loss": "total", "loss_minus_floor": "total − floor", "alignment": "alignment",
        "penalty": "penalty"}, False),
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


def pretraining_plots(runs: Sequence[Curve]) -> list[Plot]:
    """Loss terms, learning rate, spectrum and effective rank over steps."""
    plots = []
    for name, title, y, names, log in PRETRAINING_PLOTS:
        series = _curves(runs, "step", names)
        if series:
            plots.append(draw(f"pretrain-{name}", title, lines, series, x="step", y=y, log=log))
    return plots


DETECTION_PLOTS = (
    ("loss", "Detection: training loss", "total_loss", "loss"),
    ("box", "Detection: box AP", "bbox/AP", "AP, percent"),
    ("mask", "Detection: mask AP", "segm/AP", "AP, percent"),
    ("pixels", "Semantic segmentation: mean IoU", "sem_seg/mIoU", "mIoU, percent"),
    ("lr", "Detection: learning rate", "lr", "learning rate"),
)


def detection_plots(runs: Sequence[Curve], results: Results) -> list[Plot]:
    """Loss and AP over iterations, AP by object size; a method has one colour in all of them."""
    runs = [dataclasses.replace(run, label=results.run_names.get(run.folder, run.label)) for run in runs]
    place = {method: i for i, method in enumerate(results.methods)}
    runs.sort(key=lambda run: place.get(run.label, len(place)))
    plots = []
    for name, title, key, y in DETECTION_PLOTS:
        series = _curves(runs, "iteration", {key: title})
        if series:
            plots.append(draw(f"detection-{name}", title, lines, series, x="iteration", y=y))
    for task in results.tasks:
        sizes = [m for m in SIZES if m in results.metrics(task)]
        bars = _bars(results, task, sizes)
        if bars:
            title = f"{task.title} AP by object size ({task.dataset}, {task.protocol})"
            names = [SIZES[m] for m in sizes]
            plots.append(draw(f"size-{task.slug}", title, _bar_groups, bars, names, "AP, percent"))
    return plots


def _bars(results: Results, task: Task, metrics: list[str]) -> dict[str, list[tuple[float, float]]]:
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
    axes.set_ylim(bottom=0, top=None if any(v[0] > 0 for b in bars.values() for v in b) else 1)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(y)


def _log_lines(axes: Axes, series: Series, ticks: Sequence[float] = (), *, x: str, y: str) -> None:
    """Lines over a logarithmic x axis, labelled at `ticks` where they are given."""
    lines(axes, series, x=x, y=y, marker="o")
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()


def classification_plots(results: Results) -> list[Plot]:
    """Accuracy by k, by learning rate of the sweep, by share of labels."""
    return [*_by_k_plots(results), *_sweep_plots(results), *_label_share_plots(results)]


def _by_k_plots(results: Results) -> list[Plot]:
    plots = []
    for task in results.tasks:
        metric = metric_of(task.dataset)
        names = [m for m in results.metrics(task) if re.fullmatch(rf"{metric}_k[1-9][0-9]{{0,8}}", m)]
        ks = sorted(int(name.rpartition("_k")[2]) for name in names)
        if len(ks) < 2:
            continue
        series: Series = []
        for method in results.methods:
            found = [(k, s.mean) for k in ks if (s := results.headline(method, task, f"{metric}_k{k}"))]
            if found:
                series.append((method, [k for k, _ in found], [v for _, v in found]))
        title = f"k-NN by k ({task.dataset}, {task.protocol})"
        y = f"{metric_name(metric)}, percent"
        plots.append(draw(f"by-k-{task.slug}", title, _log_lines, series, ks, x="k", y=y))
    return plots


def _sweep_plots(results: Results) -> list[Plot]:
    """One curve a method from `settings.sweep`, a list of {lr, weight_decay, top1}: the best of each rate.

    In place of top1 stands mean_per_class where the data set is reported in it.
    """
    plots = []
    for task in results.tasks:
        metric = metric_of(task.dataset)
        series: Series = []
        for method in results.methods:
            best: dict[float, float] = {}
            for record in results.all_records(method, task)[:1]:
                for head in (record["settings"] or {}).get("sweep") or []:
                    lr, value = head.get("lr"), head.get(metric)
                    if isinstance(lr, int | float) and isinstance(value, int | float) and lr > 0:
                        best[lr] = max(value, best.get(lr, value))
            if len(best) > 1:
                series.append((method, sorted(best), [best[lr] for lr in sorted(best)]))
        if series:
            title = f"Linear by learning rate ({task.dataset}, {task.protocol})"
            y = f"{metric_name(metric)} of the selecting split, percent"
            plots.append(draw(f"sweep-{task.slug}", title, _log_lines, series, x="learning rate", y=y))
    return plots


def _label_share_plots(results: Results) -> list[Plot]:
    by_setting: dict[Task, list[Task]] = defaultdict(list)
    for task in results.tasks:
        if task.name == "semisup":
            by_setting[dataclasses.replace(task, label_percent=0.0)].append(task)
    plots = []
    for setting, tasks in by_setting.items():
        series: Series = []
        for method in results.methods:
            found = [(t.label_percent, s.mean) for t in tasks if (s := results.headline(method, t))]
            if found:
                series.append((method, [p for p, _ in found], [v for _, v in found]))
        shares = sorted({x for _, xs, _ in series for x in xs})
        if len(shares) < 2:
            continue
        slug = f"labels-{tasks[0].slug}"
        title = f"Fine-tuning by share of labels ({setting.dataset}, {setting.protocol})"
        x, y = "share of the labels, percent", f"{metric_name(metric_of(setting.dataset))}, percent"
        plots.append(draw(slug, title, _log_lines, series, shares, x=x, y=y))
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
    if len(seconds) < 2:
        return []
    minutes = {task: s / 60 for task, s in seconds.items()}
    return [draw("wall-time", "Wall time by task", _bars_across, minutes, "minutes, all runs of the task")]


def _bars_across(axes: Axes, values: dict[str, float], x: str) -> None:
    axes.barh(list(values), list(values.values()), color=COLOURS[0])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(x)
