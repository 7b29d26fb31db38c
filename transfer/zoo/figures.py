"""Published figures, of figures.yaml or of a manifest of your own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml

FILE = Path(__file__).parent / "figures.yaml"
MOST_IMAGES = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published model's figures in one task, as its source prints them; nothing here was re-measured."""

    method: str
    arch: str = "resnet50"
    pretraining: str
    """Epochs, batch, views."""
    task: str
    dataset: str
    split: str = ""
    """The split as results say it, where it is another than the data set's own test images as a whole."""
    protocol: str = ""
    """name@version of our file of the same protocol, or a file of your own; empty where there is none."""
    note: str = ""
    metrics: Mapping[str, float]
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Standard deviation where the source gives one."""
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Points within which a figure counts as reproduced, where they are not the task's usual ones."""
    trials: int | None = None
    selection: str = ""
    """best: the epoch that is best on the images evaluated; empty where the source does not say."""
    n: int
    """Images evaluated."""
    source: str
    """URL."""
    checkpoint: str = ""
    """The zoo's entry that the figures are of; empty for none."""

    def __post_init__(self) -> None:
        """Raises ValueError for a figure that nobody could compare or look up."""
        for f in dataclasses.fields(self):
            if f.type == "str" and not isinstance(value := getattr(self, f.name), str):
                raise ValueError(f"{short(self.method)}: {f.name}: {short(value)}: wanted text")
        for name, kind in (("metrics", Mapping), ("spread", Mapping), ("tolerance", Mapping)):
            values = getattr(self, name)
            if not isinstance(values, kind) or not all(
                isinstance(k, str) and _number(v) for k, v in values.items()
            ):
                raise ValueError(f"{self.name}: {name}: {short(values)}: wanted entries NAME: NUMBER")
            if name != "metrics" and any(v < 0 for v in values.values()):
                raise ValueError(f"{self.name}: {name}: {short(values)}: wanted numbers of at least 0")
        if not self.metrics:
            raise ValueError(f"{self.name}: wanted metrics")
        if not str(self.source).startswith("https://"):
            raise ValueError(f"{self.name}: wanted a source, the URL of the page that has the figure")
        if self.trials is not None and not (type(self.trials) is int and 0 < self.trials <= MOST_IMAGES):
            raise ValueError(f"{self.name}: trials: {short(self.trials)}: wanted a whole number above 0")
        if not (type(self.n) is int and 0 < self.n <= MOST_IMAGES):
            raise ValueError(f"{self.name}: wanted n, the number of images evaluated")

    @property
    def name(self) -> str:
        """The row's name: method, architecture, pretraining."""
        return f"{self.method}, {self.arch}, {self.pretraining}"

    @property
    def protocol_name(self) -> str:
        """name@version, of a file of your own as well."""
        return Path(self.protocol).stem if self.protocol.endswith(".yaml") else self.protocol

    def within(self, metric: str) -> float:
        """Points within which a re-run counts as reproduced."""
        usual = _document()["tolerances"].get(self.task, 0.5)
        return float(self.tolerance.get(metric, max(usual, 2 * self.spread.get(metric, 0.0))))


def _number(value: object) -> bool:
    """Whether `value` is one that can be compared with a figure in percent."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6  # nan is not


@functools.cache
def _document() -> dict[str, Any]:
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def source_of(word: str) -> str:
    """The URL that a name under `sources` stands for; another word as it is."""
    return str(_document()["sources"].get(word, word))


def read_figure(raw: Mapping[str, Any]) -> Published:
    """A row of figures.yaml. Raises ValueError for one without metrics, images or the URL of its source."""
    said = {"n": _document()["images"].get(str(raw.get("dataset")), 0), **raw}
    said["source"] = source_of(str(raw.get("source", "")))
    try:
        return Published(**said)
    except TypeError as error:  # a field is missing, or unknown
        why = str(error).replace("Published.__init__()", "a figure")
        raise ValueError(f"{short(dict(raw))}: {why}") from error


@functools.cache
def load_published() -> tuple[Published, ...]:
    """All figures that come with the project, in the file's order."""
    return tuple(map(read_figure, _document()["results"]))
