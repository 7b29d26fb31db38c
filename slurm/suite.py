"""A recipe or checkpoints enter; the whole downstream table leaves: on SLURM, or on this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.cli import EXIT_FAILED, UserError, parse_settings, save_settings
from pretrain.settings import Settings as PretrainSettings
from slurm import checks, tasks
from slurm.folder import locked, refuse_other_configuration, set_aside
from slurm.graph import Graph, Step
from slurm.local import LocalRun, Machine
from slurm.look import DONE
from slurm.options import spread
from slurm.resources import Resources, load_profile
from slurm.snapshot import pin
from slurm.table import as_lines, summary
from slurm.tasks import DETECTION, Images, Subject
from transfer.voc07 import NAME as VOC07

CLASSIFICATION = ("knn", "linear", "semisup1", "semisup10")
SUBMIT_LOCK_WAIT_S = 120
DESCRIPTION = """Pretrain by a recipe, or take checkpoints; judge them; report. On SLURM or on this machine.

pretrain ─▶ proof ─▶ k-NN, linear, semi-supervised (x seeds) ─▶ report
              └────▶ conversion ─▶ detection (x seeds) ────────┘
"""
GROUPS = {
    "output": "what to judge", "tasks": "how to judge it", "dataset": "data",
    "knn_protocol": "protocols, and further options of the steps", "cluster": "where it runs",
    "dry_run": "this call",
}  # fmt: skip
"""The first option of each group of --help, and the group's title."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Settings of `python -m slurm suite`."""

    output: str
    """Folder for everything; run again on it to submit what is missing."""
    recipe: str | None = None
    """Pretrain by this recipe, a name or a YAML file; or give --weights."""
    weights: list[str] | None = None
    """Checkpoint files to judge, in any known format: --weights A.pth B.pth."""
    branch: Literal["online", "ema"] = "online"
    """Which of two networks of a checkpoint to judge."""
    control: bool = False
    """With --recipe: judge the same initialisation, untrained, as well."""
    tasks: list[str] | None = None
    """What to judge by: knn, linear, semisup1, semisup10, and for detection coco_c4_2x, other names in
    detection_configs/ or a YAML file."""
    seeds: int = 1
    """Runs of every task that has randomness, with seeds 0, 1 ...; k-NN has none and runs once."""
    pretrain_seed: int = 0
    """Seed of pretraining."""
    dataset: str | None = None
    """Labelled images, for pretraining too; the recipe's own when not given, imagenet for --weights."""
    data_dir: str | None = None
    """Folder of the data set."""
    detection_data: list[str] | None = None
    """COCO-format folders by name: NAME=ANNOTATIONS.json:IMAGES, where not in DETECTRON2_DATASETS."""
    knn_protocol: str | None = None
    """Protocol of k-NN: solo_knn@1, or INTL's intl_cifar_5nn@1 for a recipe with the CIFAR stem."""
    linear_protocol: str | None = None
    """Protocol of the linear probe: intl_linear@1, or INTL's intl_cifar_linear@1 for a recipe with the CIFAR
    stem, voc07_svm@1 for voc07."""
    semisup_protocol: str = "intl_semisup_as_released@1"
    """Protocol of the semi-supervised evaluation."""
    pretrain_options: str = ""
    """Further options for pretraining, as one text: "--epochs 2". Every --hook-every-epochs the k-NN accuracy
    of the running backbone is logged, unless this says "--hook null"."""
    linear_options: str = ""
    """Further options for the linear probe."""
    semisup_options: str = ""
    """Further options for the semi-supervised evaluation."""
    detection_options: str = ""
    """Further options for detection: "SOLVER.MAX_ITER 100"."""
    cluster: Literal["local", "slurm"] = "local"
    """This machine, or SLURM."""
    profile: str | None = None
    """What each kind of step asks for: a name in slurm/profiles or a YAML file; local has its own."""
    override: list[str] | None = None
    """Changes to the profile: --override pretrain.timeout_min=600 all.account=vision."""
    dry_run: bool = False
    """Print the graph, the sbatch headers and the GPU-hours, check everything, submit nothing."""
    force: list[str] | None = None
    """Steps or kinds of step to compute again, with all that needs them; old results are kept aside."""

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.weights):
            raise UserError("wanted either --recipe NAME|FILE or --weights FILE...")
        if not self.tasks:
            raise UserError(f"wanted --tasks, of: {', '.join((*CLASSIFICATION, *DETECTION))}")
        for task in self.tasks:
            if task in CLASSIFICATION:
                continue
            try:
                tasks.detection_config(task)
            except UserError as error:
                raise UserError(
                    f"--tasks {task}: unknown; known: {', '.join((*CLASSIFICATION, *DETECTION))}, a name in "
                    "detection_configs/, or a detectron2 YAML file"
                ) from error
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: wanted at least 1")
        if not self.data_dir and (self.recipe or set(self.tasks).intersection(CLASSIFICATION)):
            raise UserError("wanted --data-dir, the folder of the labelled images")
        if self.cluster == "slurm" and not self.profile:
            raise UserError("--cluster slurm wants --profile: copy one of slurm/profiles and adapt it")


def main(argv: list[str]) -> int | None:
    """Check, then submit or run what is missing."""
    lists = ["--weights", "--tasks", "--override", "--force", "--detection-data"]
    asked = parse_settings(
        Suite, spread(argv, lists), prog="python -m slurm suite", description=DESCRIPTION, groups=GROUPS
    )
    root = Path(asked.output).resolve()
    resources = load_profile(asked.profile or "local", asked.override or [])
    graph = suite_graph(root, asked, resources)
    redo = graph.forced(asked.force or [])
    if asked.dry_run:
        refuse_other_configuration(root, graph, redo)
        return _dry_run(asked, graph, root, resources, redo)
    problems = checks.check(asked, graph, root, resources)
    if problems:
        raise UserError("nothing was submitted:\n  " + "\n  ".join(problems))
    if asked.cluster == "slurm":
        return _to_slurm(asked, graph, root, resources, redo)
    return _here(asked, graph, root, resources, redo)


def suite_graph(root: Path, asked: Suite, resources: dict[str, Resources]) -> Graph:
    """The steps that the settings ask for."""
    steps: list[Step] = []
    subjects: list[Subject] = []
    images = Images(dataset=dataset_of(asked), data_dir=Path(asked.data_dir or ".").resolve())
    if asked.recipe:
        extra = asked.pretrain_options.split()
        steps.append(tasks.pretraining(root, asked.recipe, images, asked.pretrain_seed, extra))
        file = "backbone.safetensors" if asked.branch == "online" else "backbone_ema.safetensors"
        subjects.append(Subject(
            name="intl", label="INTL", weights=str(root / "pretrain" / file), needs=("pretrain",)
        ))  # fmt: skip
        if asked.control:
            untrained = tasks.control(
                root, asked.recipe, images, asked.pretrain_seed, tasks.without(extra, "--epochs")
            )
            steps.append(untrained)
            weights = str(root / "control" / "backbone.safetensors")
            subjects.append(
                Subject(name="control", label="random control", weights=weights, needs=("control",))
            )
    for name, path in _files(asked.weights or []).items():
        subjects.append(Subject(name=name, label=name, weights=str(path), branch=asked.branch))
    evaluations: list[Step] = []
    protocols = protocols_of(asked)
    for subject in subjects:
        proved = tasks.proof(root, subject)
        steps.append(proved)
        proven = tasks.after(subject, proved)
        wanted = asked.tasks or []
        evaluations += [
            step
            for task in wanted if task in CLASSIFICATION
            for step in _judged(root, proven, images, task, asked, protocols)
        ]  # fmt: skip
        detections = [task for task in wanted if task not in CLASSIFICATION]
        if detections:
            converted = tasks.conversion(root, proven)
            steps.append(converted)
            gpus = 1 if resources["detection"].gpus_per_node else 0
            for task in detections:
                for seed in range(asked.seeds):
                    evaluations.append(tasks.detection(
                        root, proven, task=Path(task).stem, config=tasks.detection_config(task), seed=seed,
                        weights=converted.makes[0], needs=(converted.name,), num_gpus=gpus,
                        datasets=asked.detection_data or [], extra=asked.detection_options.split(),
                    ))  # fmt: skip
    report = tasks.report(root, [*(s for s in steps if s.kind in ("pretrain", "control")), *evaluations])
    return Graph([*steps, *evaluations, report])


def dataset_of(asked: Suite) -> str:
    """The data set's name; parses the recipe with its overrides, as the job will, where there is one."""
    settings = recipe_of(asked)
    return settings.dataset if settings else asked.dataset or "imagenet"


def recipe_of(asked: Suite) -> PretrainSettings | None:
    """What will be pretrained, with all overrides; None for --weights."""
    if not asked.recipe:
        return None
    named = ["--dataset", asked.dataset] if asked.dataset else []
    return tasks.recipe_settings(
        asked.recipe, [*named, *asked.pretrain_options.split()], data_dir=asked.data_dir, output=asked.output
    )


def protocols_of(asked: Suite) -> dict[str, str]:
    """The protocol of each kind of task: the one asked for, else the one that the field reports it by."""
    settings = recipe_of(asked)
    cifar = settings is not None and settings.stem == "cifar"
    linear = "voc07_svm@1" if dataset_of(asked) == VOC07 else "intl_linear@1"
    return {
        "knn": asked.knn_protocol or ("intl_cifar_5nn@1" if cifar else "solo_knn@1"),
        "linear": asked.linear_protocol or ("intl_cifar_linear@1" if cifar else linear),
        "semisup": asked.semisup_protocol,
    }


def _files(weights: list[str]) -> dict[str, Path]:
    """Absolute paths by name: the file's, with as many of its folders as it takes to tell all apart."""
    paths = [Path(w).resolve() for w in weights]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--weights {path}: no such file")
        if paths.count(path) > 1:
            raise UserError(f"--weights names {path} twice")
    for depth in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        named = {"-".join([*p.parts[1:][-depth:-1], p.stem]): p for p in paths}
        if len(named) == len(paths):
            return named
    same = ", ".join(str(p) for p in paths)
    raise UserError(f"--weights: these differ in nothing but their suffix, rename one: {same}")


def _judged(
    root: Path, subject: Subject, images: Images, task: str, asked: Suite, protocols: dict[str, str]
) -> list[Step]:
    """One classification task: k-NN once, the others for each seed."""
    if task == "knn":
        return [tasks.classification(
            root, subject, images, kind="knn", protocol=protocols["knn"], seed=None
        )]  # fmt: skip
    if task == "linear":
        kind, extra = "linear", asked.linear_options.split()
    else:
        kind = "semisup"
        extra = ["--label-percent", task.removeprefix("semisup"), *asked.semisup_options.split()]
    return [
        tasks.classification(
            root, subject, images, kind=kind, protocol=protocols[kind], seed=seed, extra=extra, folder=task
        )
        for seed in range(asked.seeds)
    ]


def _dry_run(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Say all that would happen; exit code 2 when a check fails."""
    from slurm import submit

    if asked.cluster == "slurm":
        planned = submit.plan(graph, root, redo)
        for batch in submit.in_order(planned.batches):
            waits = ", ".join((*batch.needs, *batch.after))
            print(f"== {', '.join(s.name for s in batch.steps)}" + (f"  (after {waits})" if waits else ""))
            for step in batch.steps:
                print(f"   {step.command}")
            text = submit.sbatch_text(batch, resources, root / "code" / "PINNED", root)
            print("\n".join(f"   {line}" for line in text.splitlines() if line.startswith("#SBATCH")))
        hours = sum(resources[b.kind].gpu_hours * len(b.steps) for b in planned.batches)
        print(
            f"{planned.count} jobs in {len(planned.batches)} submissions, at most {hours:.1f} GPU-hours "
            f"(every job up to its time limit, once); {len(planned.done)} steps are done, "
            f"{len(planned.live)} queued or running"
        )
    else:
        machine = Machine.here()
        for step in graph:
            fit = machine.fit(resources[step.kind])
            waits = ", ".join((*step.needs, *step.after))
            print(
                f"== {step.name}: {fit.tasks} x {fit.cpus_per_task} CPUs, {fit.gpus_per_node} GPUs"
                + (f"  (after {waits})" if waits else "")
            )
            print(f"   {step.command}")
        print(f"{len(graph)} steps on {machine.cpus} CPU cores and {len(machine.gpus)} GPUs")
    problems = checks.check(asked, graph, root, resources)
    for problem in problems:
        print(f"check failed: {problem}")
    if problems:
        raise UserError(
            f"{len(problems)} check{'s' if len(problems) > 1 else ''} failed; nothing would be submitted"
        )
    print("all checks passed; nothing was submitted")
    return None


def _to_slurm(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Submit what is missing, under the folder's lock."""
    import subprocess

    from slurm import submit

    with locked(root, SUBMIT_LOCK_WAIT_S):
        refuse_other_configuration(root, graph, redo)
        planned = submit.plan(graph, root, redo)
        if planned.superseded:
            ids = [str(submit.Record(root, n).submitted["job_id"]) for n in planned.superseded]
            subprocess.run(["scancel", *ids], timeout=60, check=True)
        set_aside(root, graph, redo)
        save_settings(asked, root / "config.yaml")
        sent = submit.submit(graph, planned, root, resources, pin(root)) if planned.batches else {}
    for name, job_id in sent.items():
        print(f"submitted {name} as {job_id}")
    for name, state in planned.live.items():
        if name not in sent:
            print(f"left alone {name}: {state.lower()}")
    print(f"{len(sent)} submitted, {len(planned.done)} done before; python -m slurm status {root} --watch")
    return None


def _here(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Run the graph on this machine, and stay until it has ended."""
    from slurm.queue import live_steps

    with locked(root):
        elsewhere = [n for n in live_steps(root) if not _is_local(root, n)]
        if elsewhere:
            raise UserError(f"{', '.join(elsewhere)}: on SLURM; `python -m slurm cancel {root}` first")
        refuse_other_configuration(root, graph, redo)
        set_aside(root, graph, redo)
        save_settings(asked, root / "config.yaml")
        views = LocalRun(graph, root, resources, pin(root)).run()
    print("\n".join(as_lines(views)))
    print(summary(views))
    if (root / "report" / "index.html").exists():
        print(f"report: {root / 'report' / 'index.html'}", file=sys.stderr)
    return EXIT_FAILED if any(v.state != DONE for v in views) else None


def _is_local(root: Path, name: str) -> bool:
    from slurm.record import Record

    return Record(root, name).submitted.get("cluster") == "local"
