"""What a suite is: its settings, and the steps that they ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pretrain.common.errors import UserError
from pretrain.data.voc07 import NAME as VOC07
from pretrain.settings import RECIPES
from pretrain.settings import Settings as PretrainSettings
from slurm.steps import tasks
from slurm.steps.graph import Graph, Step
from slurm.steps.pretrainings import MOST_PRETRAININGS, pretrainings
from slurm.steps.resources import Resources
from slurm.steps.tasks import BACKBONES, DETECTION, Images, Target
from transfer.checkpoints.user_format import read_user_format
from transfer.conversion.availability import CONFIGS
from transfer.evaluation.protocol import FOLDER
from transfer.evaluation.provenance import file_labels, kept_epoch
from transfer.options.weights import WeightsOptions
from transfer.zoo.download import located
from transfer.zoo.manifest import PREFIX

REPRODUCE = "reproduce"
CLASSIFICATION = ("knn", "linear", "semisup1", "semisup10", REPRODUCE)
WITH_OPTIONS = ("pretrain", "knn", "linear", "semisup", "detection")
"""Kinds of steps that take further options, as a text: --KIND-options."""


@dataclass(frozen=True, kw_only=True)
class Suite(WeightsOptions):
    """Settings of `python -m slurm suite`."""

    output: str
    """Folder for everything; run again on it to submit what is missing."""
    recipe: str | None = None
    """Pretrain by this recipe, a name or a YAML file; or give --weights."""
    weights: list[str] | None = None
    """Checkpoint files to evaluate, in any known format, all read alike, or zoo:NAME, fetched here and now:
    --weights A.pth B.pth zoo:dino_resnet50; RUN/checkpoint_epoch*.pt are a run's kept checkpoints,
    which the report plots over the epochs."""
    branch: Literal["online", "ema"] | None = None
    """Which of two networks to evaluate, of a checkpoint or of a recipe that trains with --ema; default:
    online, of zoo:NAME the one that is published."""
    control: bool = False
    """With --recipe: also evaluate the same initialisation, untrained."""
    tasks: list[str] | None = None
    """How to evaluate: knn, linear, semisup1, semisup10, for detection coco_c4_2x, for semantic segmentation
    sem_seg_voc12_linear, other names in detection_configs/ or a YAML file; reproduce: the published figures
    of each zoo:NAME."""
    seeds: int = 1
    """Runs of every task that has randomness, with seeds 0, 1 ...; k-NN has none and runs once."""
    label: str | None = None
    """Name of the row in the report, of all --weights, which are seeds of one method then (of
    checkpoint_epoch*.pt: its epochs), or of the recipe; default: the file's name, or the objective's."""
    pretrain_seed: int = 0
    """Seed of pretraining."""
    pretrain_seeds: int = 1
    """Pretrainings, with this many seeds from --pretrain-seed on; the report pools them as one method."""
    sweep: list[str] | None = None
    """Pretrain with each value of an option, and evaluate each: --sweep lr=0.1,0.3 weight_decay=1e-6,1e-5 are
    four pretrainings."""
    dataset: str | None = None
    """Labelled images, for pretraining too; the recipe's own when not given, imagenet for --weights."""
    data_dir: str | None = None
    """Folder of the data set."""
    detection_data: list[str] | None = None
    """COCO-format folders by name: NAME=ANNOTATIONS.json:IMAGES, where not in DETECTRON2_DATASETS."""
    sem_seg_data: list[str] | None = None
    """Folders of images and label masks by name: NAME=IMAGES:MASKS, where not in DETECTRON2_DATASETS."""
    knn_protocol: str | None = None
    """Protocol of k-NN: dino_knn@2 on ImageNet, INTL's intl_cifar_5nn@2 for a recipe with the CIFAR stem,
    else solo_knn@2."""
    linear_protocol: str | None = None
    """Protocol of the linear probe: intl_linear@2, or INTL's intl_cifar_linear@2 for a recipe with the CIFAR
    stem, voc07_svm@2 for voc07."""
    semisup_protocol: str = "intl_semisup_as_released@1"
    """Protocol of the semi-supervised evaluation."""
    pretrain_options: str = ""
    """Further options for pretraining, as one text quoted as in a shell: "--epochs 2". The k-NN
    accuracy of the running backbone is logged every --hook-every-epochs, unless this says "--hook null"."""
    knn_options: str = ""
    """Further options for k-NN: "--image-size 32"."""
    linear_options: str = ""
    """Further options for the linear probe."""
    semisup_options: str = ""
    """Further options for the semi-supervised evaluation."""
    detection_options: str = ""
    """Further options for detection and semantic segmentation: "SOLVER.MAX_ITER 100"."""
    cluster: Literal["local", "slurm"] = "local"
    """This machine, or SLURM."""
    profile: str | None = None
    """What each kind of step asks for: a name in slurm/profiles or a YAML file; local has its own."""
    override: list[str] | None = None
    """Changes to the profile: --override pretrain.timeout_min=600 all.account=vision."""
    include: list[str] | None = None
    """Files or folders of this project that jobs need and git does not track: they get the tracked ones,
    and the recipe, protocols and configs named here."""
    dry_run: bool = False
    """Print the graph, the sbatch headers and the GPU-hours, check everything, submit nothing."""
    force: list[str] | None = None
    """Steps or kinds of step to compute again, with all that needs them; old results are kept aside."""

    def __post_init__(self) -> None:
        """Raises UserError for settings that cannot be together, ValueError for numbers out of range."""
        super().__post_init__()
        if bool(self.recipe) == bool(self.weights):
            raise UserError("wanted either --recipe NAME|FILE or --weights FILE...")
        if self.recipe and (self.read_with or self.arch or self.zoo):
            said = " ".join(self.reading(branch="online").words[2:])
            raise UserError(f"{said}: how to read --weights; a recipe's own weights are read as they are")
        if self.weights_format is not None:
            read_user_format(self.weights_format)
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
        for name in ("seeds", "pretrain_seeds"):
            if not 1 <= (count := getattr(self, name)) <= MOST_PRETRAININGS:
                wanted = f"1 to {MOST_PRETRAININGS}"
                raise UserError(f"--{name.replace('_', '-')} {count}: wanted {wanted}")
        others = [w for w in self.weights or ["a recipe's"] if not w.startswith(PREFIX)]
        if REPRODUCE in self.tasks and others:
            raise UserError(f"--tasks {REPRODUCE}: wanted --weights zoo:NAME, not {others[0]}")
        if self.weights and (self.sweep or self.pretrain_seeds > 1):
            raise UserError("--sweep and --pretrain-seeds go with --recipe; --weights are trained already")
        if not self.data_dir and (self.recipe or set(self.tasks).intersection(CLASSIFICATION)):
            raise UserError("wanted --data-dir, the folder of the labelled images")
        for kind in WITH_OPTIONS:
            self.options_of(kind)
        if self.cluster == "slurm" and not self.profile:
            raise UserError("--cluster slurm wants --profile: copy one of slurm/profiles and adapt it")

    @cached_property
    def pretraining(self) -> PretrainSettings | None:
        """What will be pretrained, parsed with all overrides as the job will; None for --weights."""
        if not self.recipe:
            return None
        return self.settings_of()

    def settings_of(self, words: Sequence[str] = ()) -> PretrainSettings:
        """The recipe's settings with all overrides and then `words`."""
        named = ["--dataset", self.dataset] if self.dataset else []
        given = [*named, *self.options_of("pretrain"), *words]
        return tasks.recipe_settings(str(self.recipe), given, data_dir=self.data_dir, output=self.output)

    def options_of(self, kind: str) -> list[str]:
        """The words of --KIND-options, quoted as in a shell."""
        return tasks.split_words(f"--{kind}-options", getattr(self, f"{kind}_options"))

    @property
    def labelled(self) -> str:
        """The name of the data set with labels."""
        return self.pretraining.dataset if self.pretraining else self.dataset or "imagenet"

    @property
    def protocols(self) -> dict[str, str]:
        """The protocol of each kind of task: the one asked for, else the one that the field reports it by."""
        cifar = self.pretraining is not None and self.pretraining.stem == "cifar"
        linear = "voc07_svm@2" if self.labelled == VOC07 else "intl_linear@2"
        knn = "dino_knn@2" if self.labelled in ("imagenet", "imagenet100") else "solo_knn@2"
        chosen = {
            "knn": self.knn_protocol or ("intl_cifar_5nn@2" if cifar else knn),
            "linear": self.linear_protocol or ("intl_cifar_linear@2" if cifar else linear),
            "semisup": self.semisup_protocol,
        }
        return {kind: str(Path(n).resolve()) if Path(n).is_file() else n for kind, n in chosen.items()}

    @property
    def detection_sets(self) -> list[str]:
        """--detection-data with absolute paths: a job does not run where the user typed them."""
        return _absolute(r"([^=]+)=(.+\.json):(.+)", self.detection_data)

    @property
    def mask_sets(self) -> list[str]:
        """--sem-seg-data with absolute paths."""
        return _absolute(r"([^=]+)=(.+):(.+)", self.sem_seg_data)

    @property
    def own_files(self) -> list[Path]:
        """What jobs need of the project beside the files that git tracks."""
        protocols = [FOLDER / f"{name}.yaml" for name in self.protocols.values()]
        configs = [CONFIGS / f"{DETECTION.get(t, t)}.yaml" for t in self.tasks or []]
        named = [RECIPES / f"{self.recipe}.yaml", *protocols, *configs]
        return [*map(Path, self.include or []), *(path for path in named if path.is_file())]


def suite_graph(root: Path, asked: Suite, resources: dict[str, Resources]) -> Graph:
    """The steps that the settings ask for."""
    steps: list[Step] = []
    targets: list[Target] = []
    images = Images(dataset=asked.labelled, data_dir=Path(asked.data_dir or ".").resolve())
    if asked.recipe:
        trained, made_from = _pretrained(root, asked, images)
        steps += trained
        targets += made_from
    layout = asked.weights_format and str(Path(asked.weights_format).resolve())
    weights = _weights(asked)
    epochs = {name: kept_epoch(str(path)) for name, (path, _) in weights.items()}
    several = len(set(epochs.values())) > 1
    words = asked.weights or []
    own = file_labels([w if w.startswith(PREFIX) else str(Path(w).resolve()) for w in words])
    for name, (path, branch) in weights.items():
        label = asked.label or own.get(str(path)) or own.get(f"{PREFIX}{name}", name)
        if asked.label and several and epochs[name] is not None:
            label += f", epoch {epochs[name]}"
        read = asked.reading(weights_format=layout, branch=branch, zoo=None)
        targets.append(Target(name=name, label=label, weights=str(path), read=read))
    wanted = asked.tasks or []
    detections = [task for task in wanted if task not in CLASSIFICATION]
    evaluations: list[Step] = []
    for target in targets:
        evaluations += [
            step
            for task in wanted if task in CLASSIFICATION
            for step in _judged(root, target, images, task, asked)
        ]  # fmt: skip
        if detections:
            converted = tasks.conversion(root, target)
            steps.append(converted)
            gpus = 1 if resources["detection"].gpus_per_node else 0
            for task in detections:
                for seed in range(asked.seeds):
                    evaluations.append(tasks.detection(
                        root, target, task=Path(task).stem, config=tasks.detection_config(task), seed=seed,
                        weights=converted.makes[0], depends_on=(converted.name,), num_gpus=gpus,
                        datasets=asked.detection_sets, masks=asked.mask_sets,
                        extra=asked.options_of("detection"),
                    ))  # fmt: skip
    report = tasks.report(root, [*(s for s in steps if s.kind in ("pretrain", "control")), *evaluations])
    return Graph([*steps, *evaluations, report])


def _pretrained(root: Path, asked: Suite, images: Images) -> tuple[list[Step], list[Target]]:
    """The pretrainings and controls, and what they leave to be evaluated."""
    steps, targets = [], []
    recipe, branch = str(asked.recipe), asked.branch or "online"
    extra = asked.options_of("pretrain")
    controls: dict[int, Step] = {}
    for run in pretrainings(asked.pretrain_seed, asked.pretrain_seeds, asked.sweep or []):
        settings = asked.settings_of(run.words)
        # "INTL" of a power too: so it stands in steps that are recorded as done
        label = asked.label or ("INTL" if settings.power is not None else settings.method)
        step = tasks.pretraining(root, recipe, images, run.seed, [*extra, *run.words], settings, run.place)
        steps.append(step)
        targets.append(Target(
            name="-".join(["intl", *filter(None, run.place.split("/"))]),
            label=f"{label} {run.setting}".rstrip(), weights=str(step.output / BACKBONES[branch]),
            read=WeightsOptions(branch=branch), depends_on=(step.name,),
        ))  # fmt: skip
        if asked.control and run.seed not in controls:
            place = f"seed{run.seed}" if run.seeds > 1 else ""
            controls[run.seed] = step = tasks.control(root, recipe, images, run.seed, extra, place)
            steps.append(step)
            targets.append(Target(
                name="-".join(filter(None, ["control", place])), label="random control",
                weights=str(step.output / BACKBONES["online"]), depends_on=(step.name,),
            ))  # fmt: skip
    return steps, targets


def _absolute(form: str, words: Sequence[str] | None) -> list[str]:
    """NAME=PATH:PATH of that form with absolute paths; other words, which a check refuses, as they are."""
    found = ((re.fullmatch(form, word), word) for word in words or [])
    return [
        f"{match[1]}={Path(match[2]).resolve()}:{Path(match[3]).resolve()}" if match else word
        for match, word in found
    ]


def _weights(asked: Suite) -> dict[str, tuple[Path, Literal["online", "ema"]]]:
    """Absolute paths by name, and which branch; what is in the zoo is fetched: jobs may have no network."""
    given = asked.weights or []
    names = [w for w in given if w.startswith(PREFIX)]
    if asked.zoo is not None and not names:
        raise UserError(f"--zoo {asked.zoo}: goes with --weights zoo:NAME")
    found: dict[str, tuple[Path, Literal["online", "ema"]]] = {
        name: (path, asked.branch or "online")
        for name, path in _files([w for w in given if w not in names]).items()
    }
    for word in names:
        path, read, entry = located(word, asked.reading())
        assert entry is not None
        if entry.name in found:
            raise UserError(f"--weights names {entry.name} twice")
        found[entry.name] = (path.resolve(), read.branch or "online")
    return found


def _files(weights: list[str]) -> dict[str, Path]:
    """Absolute paths by name: the file's, with as many of its folders as it takes to tell all apart."""
    paths = [Path(w).resolve() for w in weights]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--weights {path}: no such file")
        if paths.count(path) > 1:
            raise UserError(f"--weights names {path} twice")
    for depth in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        named = {_plain("-".join([*p.parts[1:][-depth:-1], p.stem])): p for p in paths}
        if len(named) == len(paths):
            return named
    same = ", ".join(str(p) for p in paths)
    raise UserError(f"--weights: these differ in nothing but their suffix, rename one: {same}")


def _plain(name: str) -> str:
    """A name that is safe for a folder, a job and a terminal."""
    return re.sub(r"[^\w.+=@-]", "_", name)


def _judged(root: Path, target: Target, images: Images, task: str, asked: Suite) -> list[Step]:
    """One classification task: k-NN and what is published once, the others for each seed."""
    if task == REPRODUCE:
        return [tasks.reproduction(root, target, images, asked.zoo)]
    kind = task if task in ("knn", "linear") else "semisup"
    labels = ["--label-percent", task.removeprefix("semisup")] if kind == "semisup" else []
    seeds: Sequence[int | None] = [None] if kind == "knn" else range(asked.seeds)
    return [
        tasks.classification(
            root,
            target,
            images,
            kind=kind,
            protocol=asked.protocols[kind],
            seed=seed,
            extra=[*labels, *asked.options_of(kind)],
            folder=task,
        )
        for seed in seeds
    ]
