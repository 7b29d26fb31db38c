"""The steps that evaluate a backbone: what each task of a suite runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.common.errors import UserError
from pretrain.settings import Settings, parse_recipe
from slurm.steps.graph import Step
from transfer.conversion.availability import CONFIGS, find_config
from transfer.options.weights import RAW_PIXELS, WeightsOptions


@dataclass(frozen=True, kw_only=True)
class Target:
    """A backbone to evaluate: a file, or `raw-pixels`."""

    name: str
    """Its folder's name: intl, control, raw-pixels."""
    label: str
    """Its name in the report."""
    weights: str
    """Absolute path of the file, or raw-pixels."""
    depends_on: tuple[str, ...] = ()
    """The steps that write the file."""
    read: WeightsOptions = field(default_factory=lambda: WeightsOptions(branch="online"))
    """How to read the file."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files of the user's own; what a step of the graph writes is known by that step's key."""
        if self.depends_on or self.weights == RAW_PIXELS:
            return ()
        layout = self.read.weights_format
        return (Path(self.weights), *([Path(layout)] if layout else ()))


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where the labelled images are."""

    dataset: str
    data_dir: Path

    @property
    def argv(self) -> tuple[str, ...]:
        """--dataset and --data-dir as a step's command takes them."""
        return ("--dataset", self.dataset, "--data-dir", str(self.data_dir))


DETECTION = {
    "coco_c4_1x": "coco_R50_C4_1x",
    "coco_c4_2x": "coco_R50_C4_2x",
    "coco_fpn_1x": "coco_R50_FPN_1x",
    "coco_fpn_2x": "coco_R50_FPN_2x",
    "voc_c4": "voc_R50_C4_24k",
    "voc_fpn": "voc_R50_FPN_24k",
    "coco_r101_fpn_1x": "coco_R101_FPN_1x",
    "coco_r101_c4_2x": "coco_R101_C4_2x",
    "coco_retinanet_1x": "coco_R50_RetinaNet_1x",
    "coco_keypoints_1x": "coco_R50_FPN_keypoints_1x",
    "coco_1percent": "coco_R50_FPN_1percent",
    "coco_2percent": "coco_R50_FPN_2percent",
    "coco_5percent": "coco_R50_FPN_5percent",
    "coco_10percent": "coco_R50_FPN_10percent",
    "coco_mini5": "coco_R50_FPN_4conv1fc_mini5",
    "coco_mini10": "coco_R50_FPN_4conv1fc_mini10",
    "cityscapes_instances": "cityscapes_R50_FPN_24k",
    "lvis_fpn": "lvis_R50_FPN_180k",
    "sem_seg_voc12_linear": "sem_seg_voc12_R50_linear_40k",
    "sem_seg_voc12_fcn": "sem_seg_voc12_R50_FCN_20k",
    "sem_seg_cityscapes_fcn": "sem_seg_cityscapes_R50_FCN_769_40k",
    "sem_seg_ade20k_fcn": "sem_seg_ade20k_R50_FCN_80k",
}
"""Tasks of detection and semantic segmentation by their short names, and the file in detection_configs."""


def detection_config(task: str) -> str:
    """What train_net is told: the name of a file in detection_configs, which the pinned code has too, or the
    absolute path of another YAML file. Raises UserError as train_net does for what it cannot find.
    """
    path = find_config(DETECTION.get(task, task)).resolve()
    return path.stem if path.parent == CONFIGS else str(path)


def split_words(option: str, text: str) -> list[str]:
    """The words of a text of options as a shell takes them; raises UserError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{option} {text}: {error}; wanted options as one text, quoted as in a shell"
        ) from error


def recipe_settings(recipe: str, words: Sequence[str], *, data_dir: str | None, output: str) -> Settings:
    """A recipe with its overrides, parsed as the job will parse it; raises UserError where the job would."""
    return parse_recipe(["--recipe", recipe, "--data-dir", data_dir or "", *words, "--output", output])


KNN_HOOK = ("--hook", "transfer.hooks:knn")
"""k-NN of the running backbone every --hook-every-epochs, into metrics.jsonl and the report's curves."""


BACKBONES = {"online": "backbone.safetensors", "ema": "backbone_ema.safetensors"}
"""What pretraining leaves for each branch."""


def pretraining(
    root: Path,
    recipe: str,
    images: Images,
    seed: int,
    extra: Sequence[str] = (),
    settings: Settings | None = None,
    place: str = "",
) -> Step:
    """INTL pretraining into `root`/pretrain, or `place` in it, with KNN_HOOK in it.

    A hook of the recipe's own or among `extra` takes its place; `--hook null` in `extra` leaves it out.
    `settings` are those of recipe and `extra`, where they have been parsed already.
    """
    if settings is None:
        settings = recipe_settings(
            recipe, extra, data_dir=str(images.data_dir), output=str(root / "pretrain")
        )
    named = any(word.partition("=")[0] == "--hook" for word in extra)
    hook = () if settings.hook is not None or named else KNN_HOOK
    branches = ("online", "ema") if settings.ema else ("online",)
    return _pretrain(root, "pretrain", recipe, images, seed, (*hook, *extra), branches, place)


def control(
    root: Path, recipe: str, images: Images, seed: int, extra: Sequence[str] = (), place: str = ""
) -> Step:
    """The same initialisation, not trained, into `root`/control, or `place` in it."""
    words = (*without(extra, "--epochs"), "--epochs", "0")
    return _pretrain(root, "control", recipe, images, seed, words, ("online",), place)


def _pretrain(
    root: Path,
    kind: str,
    recipe: str,
    images: Images,
    seed: int,
    extra: Sequence[str],
    branches: Sequence[str],
    place: str,
) -> Step:
    name = f"{kind}/{place}" if place else kind
    output = root / name
    file = Path(recipe)
    own = file.suffix in (".yaml", ".yml") and file.is_file()
    recipe = str(file.resolve()) if own else recipe
    return Step(
        name=name,
        kind=kind,
        command="pretrain",
        argv=("--recipe", recipe, *images.argv, "--seed", str(seed), *extra, "--output", str(output)),
        output=output,
        inputs=(file.resolve(),) if own else (),
        makes=tuple(output / BACKBONES[branch] for branch in branches),
    )


def without(words: Sequence[str], option: str) -> list[str]:
    """`words` without an option and its value, however often and in either form it is given."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def conversion(root: Path, target: Target) -> Step:
    """detectron2's weights in `root`/convert, proved equal."""
    file = root / "convert" / f"{target.name}.pkl"
    return Step(
        name=f"convert/{target.name}",
        kind="export",
        command="transfer convert",
        argv=("--weights", target.weights, *target.read.words, "--output", str(file)),
        output=root / "convert" / target.name,
        depends_on=target.depends_on,
        inputs=target.inputs,
        makes=(file,),
    )


def classification(
    root: Path,
    target: Target,
    images: Images,
    *,
    kind: str,
    protocol: str,
    seed: int | None,
    extra: Sequence[str] = (),
    folder: str | None = None,
) -> Step:
    """k-NN, linear or semi-supervised evaluation; `seed` None for what has no randomness."""
    name = f"{folder or kind}/{target.name}" + ("" if seed is None else f"/seed{seed}")
    output = root / name
    words = ["--weights", target.weights, "--protocol", protocol, *images.argv, "--output", str(output)]
    if target.weights != RAW_PIXELS:
        words += target.read.words
    if kind != "semisup":
        words += ["--cache-dir", str(root / "features")]
    words += ["--label", target.label]
    if seed is not None:
        words += ["--seed", str(seed)]
    return Step(
        name=name,
        kind=kind,
        command=f"transfer {kind}",
        argv=(*words, *extra),
        output=output,
        depends_on=target.depends_on,
        inputs=(*target.inputs, *([Path(protocol)] if Path(protocol).is_absolute() else ())),
        makes=(output / "results.jsonl",),
    )


def reproduction(root: Path, target: Target, images: Images, zoo: str | None) -> Step:
    """The protocols of a published checkpoint's figures, into `root`/reproduce/<target>."""
    output = root / "reproduce" / target.name
    own = ("--zoo", str(Path(zoo).resolve())) if zoo else ()
    return Step(
        name=f"reproduce/{target.name}",
        kind="linear",
        command="transfer reproduce",
        argv=(target.name, *own, *images.argv, "--output", str(output)),
        output=output,
        inputs=(*target.inputs, *map(Path, own[1:])),
        makes=(output / "reproduction.json",),
    )


def detection(
    root: Path,
    target: Target,
    *,
    task: str,
    config: str,
    seed: int,
    weights: Path | None,
    depends_on: tuple[str, ...],
    datasets: Sequence[str] = (),
    masks: Sequence[str] = (),
    num_gpus: int = 0,
    extra: Sequence[str] = (),
) -> Step:
    """Fine-tuning into `root`/detection/<task>/<target>/seedN; no `weights`: random initialisation."""
    name = f"detection/{task}/{target.name}/seed{seed}"
    output = root / name
    words = ["--config-file", config, "--num-gpus", str(num_gpus)]
    for dataset in datasets:
        words += ["--dataset", dataset]
    for mask_set in masks:
        words += ["--sem-seg", mask_set]
    words += ["--label", target.label]
    words += ["--random-init"] if weights is None else ["MODEL.WEIGHTS", str(weights)]
    words += ["OUTPUT_DIR", str(output), "SEED", str(seed), *extra]
    return Step(
        name=name,
        kind="detection",
        command="transfer.train_net",
        argv=tuple(words),
        output=output,
        depends_on=depends_on,
        inputs=(Path(config),) if Path(config).is_absolute() else (),
        makes=(output / "results.jsonl",),
    )


def report(root: Path, steps: Sequence[Step], title: str | None = None) -> Step:
    """The report over all that has ended, into `root`/report; it says itself what is missing."""
    output = root / "report"
    return Step(
        name="report",
        kind="report",
        command="transfer report",
        argv=(str(root), "--output", str(output), *(("--title", title) if title else ())),
        output=output,
        after=tuple(s.name for s in steps),
        makes=(output / "index.html",),
    )
