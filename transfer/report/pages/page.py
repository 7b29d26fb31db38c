"""The report's files: index.html, report.md, tables/, plots/ and pictures/."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pretrain.common.files import atomic_path, write_json
from pretrain.common.output_folder import need_space
from transfer.report.evidence.collect import Evidence
from transfer.report.evidence.grouping import Results
from transfer.report.evidence.labels import printable
from transfer.report.pages import inventory, pictures, plots, statements, tables
from transfer.report.pages.epochs import TEXT as EPOCHS_TEXT
from transfer.report.pages.epochs import epoch_plots
from transfer.report.pages.pictures import Shown
from transfer.report.pages.plots import Plot
from transfer.report.pages.spectrum import spectrum_tables
from transfer.report.pages.study import read_study
from transfer.report.pages.summary import summary
from transfer.report.pages.tables import Table

MANIFEST = ".report-files.json"
TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands below it."""

    slug: str
    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[Shown, ...] = ()
    points: tuple[str, ...] = ()
    """Plain statements."""
    notes: tuple[str, ...] = ()
    """What could not be shown, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """The report's whole content, for both templates."""

    title: str
    roots: tuple[str, ...]
    verdict: Table | None
    summary: str
    """One paragraph in words; empty for none."""
    differences: Table | None
    """Of the best model, below the verdict."""
    alarms: tuple[str, ...]
    sections: tuple[Section, ...]
    measurements: Table

    @property
    def tables(self) -> list[Table]:
        """Every table shown, in the page's order."""
        return [*_some(self.verdict), *_some(self.differences), *(t for s in self.sections for t in s.tables)]


def compose(evidence: Evidence, results: Results, *, title: str, per_folder: int) -> Page:
    """Everything that the report says, in its order; sections with nothing in them are left out."""
    studies = [read_study(folder, i) for i, folder in enumerate(evidence.studies)]
    found = [*evidence.pictures, *(p for s in studies for p in s.pictures)]
    shown, left_out = pictures.load(found, per_folder=per_folder)
    evidence = dataclasses.replace(evidence, problems=[*evidence.problems, *left_out])
    near, unseen = _neighbours(results)
    differences, others = statements.differences(results)
    missing = inventory.gaps(evidence)
    elsewhere = statements.published_elsewhere(results)
    wall = inventory.costs(evidence)
    weights = inventory.judged(evidence)
    curves = plots.pretraining_plots(evidence.pretraining)
    detection = plots.detection_plots(evidence.detection, results)
    spectra, predicted = spectrum_tables(results)
    sections = [
        Section(slug="differences", title="Differences between the others", tables=_some(others)),
        Section(slug="missing", title="Missing, failed and stale", tables=_some(missing)),
        Section(slug="judged", title="What was evaluated", tables=_some(weights)),
        Section(
            slug="tasks", title="Tasks",
            text=" ".join([TASKS_TEXT, *results.notes]),
            tables=tuple(statements.task_table(results, task) for task in results.tasks),
            plots=tuple(plots.classification_plots(results)),
        ),
        Section(
            slug="epochs", title="Over the epochs of pretraining", text=EPOCHS_TEXT,
            plots=tuple(epoch_plots(results)),
        ),
        Section(slug="elsewhere", title="Published under other protocols", tables=_some(elsewhere)),
        Section(slug="pretraining", title="Pretraining", plots=tuple(curves)),
        Section(slug="detection", title="Detection and segmentation", plots=tuple(detection)),
        Section(
            slug="predictions", title="Predictions beside ground truth", text=PREDICTIONS_TEXT,
            pictures=tuple(p for p in shown if p.section == "predictions"),
        ),
        Section(
            slug="studies", title="Spectrum studies", tables=tuple(s.table for s in studies if s.table),
            points=tuple(line for s in studies for line in s.statements),
            pictures=tuple(p for p in shown if p.section == "studies"),
        ),
        Section(
            slug="spectrum", title="Spectrum", tables=spectra, points=predicted,
            pictures=tuple(p for p in shown if p.section == "spectrum"),
        ),
        Section(
            slug="neighbours", title="Nearest neighbours", pictures=tuple(near), text=NEIGHBOURS_TEXT,
            notes=tuple(unseen),
        ),
        Section(slug="costs", title="Wall time", tables=_some(wall), plots=tuple(plots.cost_plots(evidence))),
    ]  # fmt: skip
    return Page(
        title=printable(title),
        roots=tuple(printable(str(r)) for r in evidence.roots),
        verdict=statements.verdict(results) if results.tasks else None,
        summary=summary(results),
        differences=differences,
        alarms=inventory.alarms(evidence),
        sections=tuple(s for s in sections if s.tables or s.plots or s.pictures or s.notes),
        measurements=inventory.measurements(results),
    )


TASKS_TEXT = "One table for each task and protocol; results of different protocols are never ranked."
PREDICTIONS_TEXT = "Left, the ground truth; right, what was predicted, with scores."
NEIGHBOURS_TEXT = (
    "Left, a test image; right, its nearest training images in feature space, nearest first. Green: of its "
    "class; red and struck through: of another."
)


def _neighbours(results: Results) -> tuple[list[Shown], list[str]]:
    """Pictures of neighbours, and which could not be made; torch is imported only where there are any."""
    if not any(task.name == "knn" for task in results.tasks):
        return [], []
    from transfer.report.pages.knn_pictures import neighbour_pictures

    return neighbour_pictures(results)


def _some(found: Table | None) -> tuple[Table, ...]:
    return (found,) if found is not None else ()


def write(page: Page, output: Path) -> None:
    """Write the report. Of what is there, only files that an earlier report listed as its own are removed."""
    files: dict[str, bytes] = {}
    for t in page.tables:
        files[f"tables/{t.name}.csv"] = tables.to_csv(t).encode()
        files[f"tables/{t.name}.tex"] = tables.to_tex(t).encode()
    files[f"tables/{page.measurements.name}.csv"] = tables.to_csv(page.measurements).encode()
    for section in page.sections:
        files |= {f"plots/{plot.name}.svg": _standalone(plot).encode() for plot in section.plots}
        files |= {f"pictures/{picture.name}": picture.data for picture in section.pictures}
    files["report.md"] = _render("report.md.j2", page).encode()
    files["index.html"] = _render("report.html.j2", page).encode()
    need_space(output, sum(map(len, files.values())), f"{len(files)} files")
    earlier = _listed(output)
    write_json(output / MANIFEST, sorted({*earlier, *files}))  # first: a kill leaves no file unlisted
    for name, content in files.items():
        with atomic_path(output / name) as aside:
            aside.write_bytes(content)
    for name in earlier - files.keys():
        (output / name).unlink(missing_ok=True)
    for name in ("tables", "plots", "pictures"):
        with contextlib.suppress(OSError):  # not empty, or not there
            (output / name).rmdir()
    write_json(output / MANIFEST, sorted(files))


def _listed(output: Path) -> set[str]:
    """The files that an earlier report in `output` listed as its own; none outside it."""
    try:
        names = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    own = re.compile(r"(tables|plots|pictures)/[A-Za-z0-9_-][A-Za-z0-9._-]*|index\.html|report\.md")
    return {n for n in names if isinstance(n, str) and own.fullmatch(n)} if isinstance(names, list) else set()


def _standalone(plot: Plot) -> str:
    """The plot as a file of its own: dark ink on white."""
    style = 'style="color:#1b1f24;background:#fff"'
    return '<?xml version="1.0" encoding="utf-8"?>\n' + plot.svg.replace("<svg ", f"<svg {style} ", 1) + "\n"


def _breakable(text: str) -> Markup:
    """Text that may be broken behind the marks inside a path or a name, not in the middle of a word."""
    return Markup(re.sub(r"(?<=\w)([/_@]+|\.(?=[^\W\d]))(?=\w)", r"\1<wbr>", str(escape(text))))


def _render(template: str, page: Page) -> str:
    html = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown_table"] = tables.to_markdown
    environment.filters["literal"] = tables.markdown_escape
    environment.filters["breakable"] = _breakable
    environment.globals["svg"] = lambda plot: Markup(plot.svg)
    environment.globals["css"] = lambda: Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(page=page)
