"""`transfer reproduce`: a published checkpoint by the protocols of its figures, and which it reproduces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.common.cli import save_settings
from pretrain.common.errors import UserError
from pretrain.common.files import file_name, write_json
from pretrain.common.output_folder import output_folder
from pretrain.common.process_group import is_main
from transfer.evaluation.results import Result
from transfer.evaluators import knn, linear
from transfer.options.commands import SETTINGS, ReproduceSettings, parse
from transfer.report.evidence.grouping import SELECTIONS, metric_name, task_of
from transfer.report.evidence.published import why_not
from transfer.report.evidence.records import Record, why_altered
from transfer.zoo.figures import Published
from transfer.zoo.manifest import PREFIX, Entry, find_entry

FILE = "reproduction.json"
EVALUATORS: dict[str, Callable[[Any], list[Result]]] = {"knn": knn.evaluate, "linear": linear.evaluate}
REPRODUCED, OUTSIDE, INCOMPARABLE = "reproduced", "outside tolerance", "not comparable"
ROUNDING = 1e-6  # of a difference of two decimal fractions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one published number."""

    task: str
    protocol: str
    metric: str
    published: float
    ours: float | None = None
    tolerance: float
    """Points; figures.yaml says where it is from."""
    verdict: str
    """reproduced, outside tolerance, or not comparable."""
    why: str = ""
    """By how much, or why not."""
    source: str
    """URL of the page that has the published number."""

    @property
    def sentence(self) -> str:
        """One line for people."""
        by = f" by {self.protocol}" if self.protocol else ""
        what = f"{self.task} {metric_name(self.metric)}{by}"
        if self.ours is None:
            return f"{self.verdict}: {what}, published {self.published:g}: {self.why}"
        return f"{self.verdict}: {what}: {self.ours:.2f} against {self.published:g} published, {self.why}"


def judge(figure: Published, found: Sequence[Result]) -> list[Outcome]:
    """Each number of `figure` beside the results of its protocol, an outcome a number.

    A result counts under the very conditions under which the report sets it beside the figure: protocol
    unaltered, as many of the same images, and the epoch chosen in the same way.
    """
    result, why = _counterpart(figure, found)
    outcomes = []
    for metric, published in figure.metrics.items():
        ours = result.metrics.get(metric) if result is not None else None
        told = why or (f"ours has {', '.join(result.metrics)} alone" if result and ours is None else "")
        tolerance, verdict = figure.within(metric), INCOMPARABLE
        if ours is not None and not told:
            points = ours - published
            beyond = abs(points) - tolerance
            verdict = OUTSIDE if beyond > ROUNDING else REPRODUCED
            said = f"{points:+.2f}, tolerance {tolerance:g}"
            told = f"{said}: outside by {beyond:.2f}" if verdict == OUTSIDE else said
            if result is not None and result.warnings:
                told += f" ({'; '.join(result.warnings)})"
        outcomes.append(_outcome(figure, metric, verdict=verdict, why=told, ours=ours))
    return outcomes


def _counterpart(figure: Published, found: Sequence[Result]) -> tuple[Result | None, str]:
    """The result to set beside the figure, or why there is none."""
    wanted = (figure.selection,) if figure.selection else SELECTIONS
    fitting = sorted(
        (r for r in found if r.selection in wanted), key=lambda r: wanted.index(r.selection)
    )  # fmt: skip
    if not fitting:
        ours = " and ".join(sorted({r.selection for r in found})) or "nothing"
        return None, f"it is of the epoch chosen as {figure.selection or 'usual'}, ours has {ours}"
    values = dataclasses.asdict(fitting[0])
    record = Record(values=values, folder=Path(), root=0, altered=why_altered(values))
    return fitting[0], why_not(figure, task_of(record))


def _outcome(figure: Published, metric: str, **said: Any) -> Outcome:
    return Outcome(
        task=figure.task, protocol=figure.protocol_name, metric=metric, published=figure.metrics[metric],
        tolerance=figure.within(metric), source=figure.source, **said,
    )  # fmt: skip


def why_not_run(figure: Published, settings: ReproduceSettings) -> str:
    """Why a figure's protocol is not run; empty where it is."""
    if not figure.protocol:
        return f"no protocol here repeats what its source did{f' ({figure.note})' if figure.note else ''}"
    if figure.task not in EVALUATORS:
        return f"{figure.task} is run by `python -m slurm suite --weights {PREFIX}{settings.name}`"
    if figure.dataset != settings.dataset:
        return f"it is of {figure.dataset}: --dataset {figure.dataset} --data-dir its folder"
    return ""


def planned(settings: ReproduceSettings) -> tuple[Entry, list[tuple[Published, str]]]:
    """The entry and each of its figures, with why it is not run, or nothing.

    Raises UserError where the zoo has no such entry, or nothing published of it can be run.
    """
    entry = find_entry(settings.name, settings.zoo)
    figures = [f for f in entry.figures if settings.task in (None, f.task)]
    found = [(f, why_not_run(f, settings)) for f in figures]
    if all(reason for _, reason in found):
        said = "\n  ".join(f"{f.task}: {reason}" for f, reason in found) or "none is known"
        raise UserError(f"{PREFIX}{entry.name} has no published figure to reproduce here:\n  {said}")
    return entry, found


def reproduce(settings: ReproduceSettings) -> list[Outcome]:
    """Run what can be run, and judge; OUTPUT has an evaluation's folder each, and reproduction.json.

    Raises UserError as `planned`.
    """
    entry, figures = planned(settings)
    writes = ("config.yaml", FILE, "features", *(f"{task}-*" for task in EVALUATORS))
    with output_folder(
        settings.output, "transfer reproduce", writes=writes, earlier=ReproduceSettings
    ) as output:
        save_settings(settings, output / "config.yaml")
        outcomes = []
        for figure, reason in figures:
            if reason:
                outcomes += [_outcome(figure, m, verdict=INCOMPARABLE, why=reason) for m in figure.metrics]
            else:
                outcomes += judge(figure, _evaluated(figure, entry, settings))
        if is_main():
            write_json(output / FILE, [dataclasses.asdict(o) for o in outcomes])
    return outcomes


def _evaluated(figure: Published, entry: Entry, settings: ReproduceSettings) -> list[Result]:
    """The results of the figure's protocol, those of an earlier run where there are any."""
    folder = f"{figure.task}-{file_name(figure.protocol_name.replace('@', '-v'))}"
    asked = SETTINGS[figure.task](
        weights=f"{PREFIX}{entry.name}", zoo=settings.zoo, protocol=figure.protocol, dataset=settings.dataset,
        data_dir=settings.data_dir, output=settings.output / folder, cache_dir=settings.output / "features",
        label=entry.name, seed=settings.seed, batch_size=settings.batch_size, workers=settings.workers,
        stage_to=settings.stage_to,
    )  # fmt: skip
    return EVALUATORS[figure.task](asked)


def main(argv: list[str]) -> int:
    """`python -m transfer reproduce NAME`."""
    settings: ReproduceSettings = parse("reproduce", argv)
    outcomes = reproduce(settings)
    if not is_main():
        return 0
    for outcome in outcomes:
        print(outcome.sentence)
    count = {v: sum(o.verdict == v for o in outcomes) for v in (REPRODUCED, OUTSIDE, INCOMPARABLE)}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    print(f"{PREFIX}{settings.name}: {told}; {settings.output / FILE}")
    return 0
