"""What each kind of step asks the machine or the cluster for, from a profile (YAML) and overrides."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pretrain.common.errors import UserError
from pretrain.common.files import read_yaml

PROFILES = Path(__file__).parents[1] / "profiles"

KINDS = {
    "prepare": "data made for the run (the demo's scenes)",
    "pretrain": "INTL pretraining",
    "control": "statistics of an untrained backbone",
    "export": "conversion to detectron2, proved equal",
    "knn": "weighted k-NN",
    "linear": "linear probe",
    "semisup": "fine-tuning with 1 % or 10 % of the labels",
    "detection": "detectron2 fine-tuning",
    "report": "tables and plots",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for. The names are those of a profile's YAML."""

    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account that pays."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = 1
    """Machines; one task a GPU on each."""
    gpus_per_node: int = 0
    """GPUs on each machine; on one machine at most as many as it has."""
    tasks_per_node: int | None = None
    """Processes on each machine: one a GPU when not given."""
    cpus_per_task: int | Literal["all"] = 1
    """CPU cores of each process; "all" (one machine only) takes the whole machine."""
    mem_gb: float | None = None
    """Memory of each machine in GB; the cluster's default when not given."""
    timeout_min: int = 60 * 24
    """Time limit in minutes; a job that reaches it is queued again and goes on."""
    signal_delay_s: int = 120
    """Seconds between the warning and the end: more than a training step and a checkpoint take."""
    max_timeouts: int = 20
    """Time limits a job may reach before it counts as failed."""
    max_requeues: int = 100
    """Times a job may be queued again for any reason before it counts as failed."""
    array_parallelism: int = 64
    """Jobs of one array that may run at once."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to keep away from."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job, such as "module load cuda"."""
    sbatch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Any further sbatch options by their long names: {reservation: mine}; true for one without a value."""

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of one full time limit."""
        return self.nodes * self.gpus_per_node * self.timeout_min / 60


OURS = ("array", "dependency", "error", "job-name", "open-mode", "output", "signal")
"""Options of sbatch by which the suite finds its jobs and their logs."""

FIELDS = {f.name: f for f in dataclasses.fields(Resources)}


def load_profile(name_or_file: str, overrides: list[str]) -> dict[str, Resources]:
    """Resources of every kind of step.

    A profile has `defaults` and `tasks: {kind: ...}`; an override is KIND.NAME=VALUE, with KIND `all` for
    every kind.
    """
    path = Path(name_or_file)
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if name_or_file in known:
        path = PROFILES / f"{name_or_file}.yaml"
    if not path.is_file():
        raise UserError(f"--profile {name_or_file}: no such file; known names: {', '.join(known)}")
    try:
        content = read_yaml(path) or {}
    except ValueError as error:
        raise UserError(f"{path} is {error}") from error
    _only(content, {"defaults", "tasks"}, f"{path}", "section")
    tasks = content.get("tasks") or {}
    _only(tasks, set(KINDS), f"{path}, tasks", "kind of step")
    defaults = content.get("defaults") or {}
    for where, given in (("defaults", defaults), *tasks.items()):
        _only(given or {}, set(FIELDS), f"{path}, {where}", "resource")
    values = {kind: {**defaults, **(tasks.get(kind) or {})} for kind in KINDS}
    for word in overrides:
        target, equals, text = word.partition("=")
        kind, dot, name = target.partition(".")
        if not (equals and dot):
            raise UserError(f"--override {word}: wanted KIND.NAME=VALUE, such as pretrain.timeout_min=600")
        if kind != "all":
            _only({kind: None}, set(KINDS), f"--override {word}", "kind of step")
        for each in KINDS if kind == "all" else (kind,):
            values[each][name] = yaml.safe_load(text)
    return {kind: _resources(kind, given, path) for kind, given in values.items()}


def _resources(kind: str, given: dict[str, Any], path: Path) -> Resources:
    _only(given, set(FIELDS), f"{path}, {kind}", "resource")
    for name, value in given.items():
        wanted = str(FIELDS[name].type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = (
            (value is None and "None" in wanted)
            or (wanted.startswith("int") and isinstance(value, int) and number and value >= 0)
            or (wanted.startswith("float") and number and value > 0)
            or (wanted.startswith("str") and isinstance(value, (str, int)))
            or ("Literal" in wanted and value == "all")
            or (wanted.startswith("tuple") and isinstance(value, list))
            or (wanted.startswith("Mapping") and isinstance(value, dict))
        )
        if not good or (name in ("nodes", "cpus_per_task", "timeout_min") and value == 0):
            raise UserError(f"{path}, {kind}: {name} is {value!r}; wanted {wanted}")
        for text in _texts(value):
            refuse_for_sbatch(f"{path}, {kind}: {name}", text, shell=name == "setup")
    for name, value in (given.get("sbatch") or {}).items():
        where = f"{path}, {kind}: sbatch"
        if not re.fullmatch(r"[a-z][a-z-]*", str(name)) or name in OURS:
            raise UserError(
                f"{where}: {name!r} cannot be set; wanted sbatch's long names, but for {', '.join(OURS)}"
            )
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: {name} is {value!r}; wanted a text, a number or true")
    changed = dict(given)
    if "setup" in changed:
        changed["setup"] = tuple(str(line) for line in changed["setup"])
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        if changed.get(name) is not None:
            changed[name] = str(changed[name])
    return Resources(**changed)


def _texts(value: Any) -> list[str]:
    """Every text in a value of a profile."""
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in _texts(part)]
    if isinstance(value, list):
        return [t for part in value for t in _texts(part)]
    return [value] if isinstance(value, str) else []


def refuse_for_sbatch(where: str, text: str, *, shell: bool = False) -> None:
    """Raises UserError for what would end a line of the job script, or be replaced in it by SLURM.

    A line of the job's `shell` may have percent signs and tabs.
    """
    if not (text.replace("\t", "") if shell else text).isprintable():
        raise UserError(f"{where} is {text!r}: control characters would become lines of the job script")
    if "%" in text and not shell:
        raise UserError(f"{where} is {text!r}: SLURM replaces what follows a %; leave it out")


def _only(given: Any, valid: set[str], where: str, what: str) -> None:
    """Refuse a name that does not exist, with the nearest one and all of them."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: wanted `name: value` lines, got {given!r}")
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{where}: unknown {what} {name!r}{hint}; valid: {', '.join(sorted(valid))}")
