"""`slurm demo`: the whole suite, small, on this machine, ending with a report.

pretrain and its untrained control; k-NN and linear probe of both and of raw pixels; conversion of both; Mask
R-CNN on each backbone, frozen, on the same budget; the report.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.common.cli import parse_settings, save_settings
from pretrain.common.errors import UserError
from pretrain.common.output_folder import check_folder
from pretrain.common.progress import counted
from pretrain.common.word_lists import spread
from slurm.commands.outcome import show_outcome
from slurm.execution.local import LocalRun, Machine
from slurm.execution.snapshot import pin
from slurm.state.step_files import Record
from slurm.state.suite_lock import WRITES, is_suite, locked, refuse_other_configuration, set_aside
from slurm.steps import tasks
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import load_profile
from slurm.steps.tasks import Images, Target
from transfer.options.weights import RAW_PIXELS

DESCRIPTION = """The whole suite, small, on this machine, ending with a report.

INTL is pretrained and evaluated beside its untrained control and raw pixels by k-NN and linear probe; both
backbones are converted, and Mask R-CNN is trained on each, frozen, on the same budget.
"""
TEXTS = ("--pretrain-options", "--scenes-options", "--detection-options")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Settings of `python -m slurm demo`."""

    output: str
    """Folder for everything; run again on it to go on."""
    dataset: Literal["fashion_mnist", "cifar10"] = "fashion_mnist"
    """Images to learn from."""
    data_dir: str | None = None
    """Where they are; found or fetched when not given."""
    seed: int = 0
    """Seed of pretraining, its control, the linear probes and the first detection run."""
    detection_seeds: int = 2
    """Detection runs from each start, with seeds seed, seed + 1 ..."""
    recipe: str | None = None
    """Recipe name or file; demo_DATASET when not given."""
    pretrain_options: str = ""
    """Further options for pretraining and its control, as one text: "--epochs 2"."""
    detection_config: str = "scenes_R18_FPN_frozen"
    """Name of a file in detection_configs, or a file."""
    detection_options: str = ""
    """Further options for detection, as one text: "SOLVER.MAX_ITER 20"."""
    scenes_options: str = ""
    """Further options for the scenes, as one text: "--train 40 --test 16"."""
    force: list[str] | None = None
    """Steps or kinds of step to compute again: --force detection."""


def main(argv: list[str]) -> int | None:
    """Prepare the data, run the graph, print the table."""
    asked = parse_settings(
        Demo, spread(argv, ["--force"], TEXTS), prog="python -m slurm demo", description=DESCRIPTION
    )
    root = Path(os.path.realpath(asked.output))  # resolve() fails at links in a circle
    check_folder(root, "slurm demo", writes=WRITES, earlier=is_suite)
    images = Images(dataset=asked.dataset, data_dir=find_images(asked.dataset, asked.data_dir))
    graph = demo_graph(root, images, asked)
    redo = graph.forced(asked.force or [])
    with locked(root, command="slurm demo"):
        refuse_other_configuration(root, graph, redo)
        set_aside(root, graph, redo)
        save_settings(asked, root / "config.yaml")
        run = LocalRun(graph, root, load_profile("local", []), pin(root))
        _say_what_comes(graph, run.machine, root)
        if not Record(root, "pretrain").done:
            shipped = asked.recipe is None and not asked.pretrain_options
            _say_how_long(graph.steps["pretrain"], REST[asked.dataset] if shipped else None)
        views = run.run()
    return show_outcome(root, views)


def find_images(dataset: str, data_dir: str | None) -> Path:
    """The folder of the images; Fashion-MNIST and CIFAR-10 are fetched when none is given."""
    from pretrain.data.datasets import open_dataset

    if data_dir:
        folder = Path(data_dir).resolve()
    elif dataset == "fashion_mnist":
        from pretrain.data.fashion_mnist import find_or_fetch

        folder = find_or_fetch().resolve()
    else:
        folder = _fetch_cifar10()
    for split in ("train", "test"):
        open_dataset(dataset, folder, split)
    return folder


def _fetch_cifar10() -> Path:
    from torchvision.datasets import CIFAR10

    from pretrain.data.cache import cache_dir

    folder = cache_dir() / "cifar10"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        CIFAR10(str(folder), download=True)
    except Exception as error:
        raise UserError(
            f"CIFAR-10 could not be fetched ({error}); give the folder of an ImageFolder tree "
            "({train,test}/<class>/*.jpg) or of torchvision's files with --data-dir (make demo DATA=DIR)"
        ) from error
    return folder


def demo_graph(root: Path, images: Images, asked: Demo) -> Graph:
    """The demo's steps; what comes first is started first."""
    recipe = asked.recipe or f"demo_{asked.dataset}"
    extra = tasks.split_words("--pretrain-options", asked.pretrain_options)
    trained = tasks.pretraining(root, recipe, images, asked.seed, extra)
    untrained = tasks.control(root, recipe, images, asked.seed, extra)
    intl = Target(
        name="intl",
        label="INTL",
        weights=str(root / "pretrain" / "backbone.safetensors"),
        depends_on=("pretrain",),
    )
    control = Target(
        name="control",
        label="random control",
        weights=str(root / "control" / "backbone.safetensors"),
        depends_on=("control",),
    )
    pixels = Target(name=RAW_PIXELS, label="raw pixels", weights=RAW_PIXELS)
    evaluations = []
    # All of one kind before the next: a backbone's k-NN and probe read the same features, made by the first.
    for kind, protocol in (("knn", "solo_knn@2"), ("linear", "cached_linear@1")):
        for target in (intl, control, pixels):
            seed = None if kind == "knn" else asked.seed
            evaluations.append(
                tasks.classification(root, target, images, kind=kind, protocol=protocol, seed=seed)
            )
    scenes = _scenes(root, images, asked)
    converted = {target: tasks.conversion(root, target) for target in (intl, control)}
    detections = _detections(root, converted, scenes, asked)
    steps = [trained, scenes, untrained, *converted.values(), *detections, *evaluations]
    told = tasks.report(
        root, [trained, untrained, *detections, *evaluations], title=f"Demo: INTL on {asked.dataset}"
    )
    return Graph([*steps, told])


def _scenes(root: Path, images: Images, asked: Demo) -> Step:
    output = root / "scenes"
    words = ["--data-dir", str(images.data_dir), "--output", str(output), "--seed", "0"]
    if images.dataset != "fashion_mnist":
        words += ["--source", images.dataset]
    return Step(
        name="scenes",
        kind="prepare",
        command="transfer scenes",
        argv=(*words, *tasks.split_words("--scenes-options", asked.scenes_options)),
        output=output,
        makes=(output / "train.json", output / "test.json"),
    )


def _detections(root: Path, converted: dict[Target, Step], scenes: Step, asked: Demo) -> list[Step]:
    """Mask R-CNN on each converted backbone, in pairs of one seed."""
    sets = [f"scenes_{s}={root / 'scenes' / f'{s}.json'}:{root / 'scenes' / s}" for s in ("train", "test")]
    config = tasks.detection_config(asked.detection_config)
    return [
        tasks.detection(
            root, target, task="scenes", config=config, seed=seed, weights=step.makes[0],
            depends_on=(scenes.name, step.name), datasets=sets,
            extra=tasks.split_words("--detection-options", asked.detection_options),
        )
        for seed in range(asked.seed, asked.seed + asked.detection_seeds)
        for target, step in converted.items()
    ]  # fmt: skip


REST = {"fashion_mnist": 380, "cifar10": 140}
"""Steps of the shipped recipe's pretraining in float32 that take as long as all that comes after it, in
float32 too where a CPU has nothing faster: of the first measured on two cores of an AMD EPYC without AVX-512,
of the second from the multiply-adds at its size of views."""


def _say_how_long(pretrain: Step, rest: int | None) -> None:
    """Print how long pretraining will take on this CPU, from a few of its steps, and how long the whole where
    all that comes after it takes as long as `rest` of them."""
    import torch

    from pretrain.data.datasets import open_dataset
    from pretrain.input_pipeline import InputPipeline
    from pretrain.learner import choose_dtype
    from pretrain.plan import Plan
    from pretrain.settings import parse_recipe
    from pretrain.tuning import seconds_of_a_step, views_to_time

    settings = parse_recipe(list(pretrain.argv))
    images = open_dataset(settings.dataset, settings.data_dir, "train", labelled=False)
    steps = Plan.of(settings, len(images), 1).steps
    if not steps or torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    views = views_to_time(InputPipeline.of(settings, images, cpu))

    def seconds(precision: Any) -> float:
        return seconds_of_a_step(dataclasses.replace(settings, precision=precision), views)

    float32 = seconds("float32")
    native = choose_dtype(settings.precision, cpu) != torch.float32
    step = min(float32, seconds(settings.precision)) if native else float32
    told = f"pretraining will take about {step * steps / 60:.0f} min"
    if rest is not None:
        told += f", all of it about {(step * steps + float32 * rest) / 60:.0f}"
    print(f"timed on this machine: {told}, more where other programs want the same cores", file=sys.stderr)


def _say_what_comes(graph: Graph, machine: Machine, root: Path) -> None:
    gpus = f", {counted(len(machine.gpus), 'GPU')}" if machine.gpus else ""
    print(
        f"{len(graph)} steps on {counted(machine.cpus, 'CPU core')}{gpus}, into {root}\n"
        f"look at them from elsewhere: python -m slurm status {root}",
        file=sys.stderr,
    )
