"""Everything that would make a suite's jobs fail, found before they wait in a queue."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.common.errors import UserError
from slurm.steps import tasks
from slurm.steps.graph import Graph
from slurm.steps.resources import Resources, refuse_for_sbatch
from slurm.steps.suite import CLASSIFICATION, REPRODUCE, Suite
from transfer.zoo.manifest import PREFIX

if TYPE_CHECKING:
    from slurm.steps.suite import Suite
    from transfer.checkpoints.backbone import Backbone
    from transfer.evaluation.protocol import Protocol

CHECKPOINT_GB = 2.0
"""Disk that one training step may need: three checkpoints of a ResNet-50 with its projector."""


def check(asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources]) -> list[str]:
    """Every problem as a line to print; an empty list when jobs may be submitted."""
    backbones, faults = _backbones(asked)
    problems = [
        *_images(asked),
        *faults,
        *_protocols(asked),
        *_reproductions(asked),
        *_detection(asked, backbones),
        *_disk(graph, root),
    ]
    if asked.cluster == "slurm":
        problems += _place(root)
    if asked.cluster == "slurm" and not (asked.dry_run and not has_slurm()):
        problems += _cluster(graph, resources)
    return problems


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def _images(asked: Suite) -> list[str]:
    from pretrain.data.datasets import open_dataset
    from pretrain.data.voc07 import NAME, open_voc07, refuse_voc07

    if not asked.data_dir:
        return []
    name = asked.labelled
    try:
        for split in ("train", "test"):
            if name == NAME and not asked.recipe:
                open_voc07(asked.data_dir, split)
            else:
                open_dataset(name, asked.data_dir, split)
        if any(task == "knn" or task.startswith("semisup") for task in asked.tasks or []):
            refuse_voc07(name)
    except UserError as error:
        return [str(error)]
    return []


def _backbones(asked: Suite) -> tuple[dict[str, Backbone], list[str]]:
    """What is to be evaluated by the option that names it, and what cannot be loaded."""
    from pretrain.network.model import build_backbone
    from transfer.checkpoints.backbone import Backbone, load_backbone
    from transfer.checkpoints.sanity import NEVER_TRAINED, never_trained

    backbones, problems = {}, []
    for path in asked.weights or []:
        try:
            read = asked.reading(**({} if path.startswith(PREFIX) else {"zoo": None}))
            loaded = load_backbone(path, read)
        except UserError as error:
            problems.append(f"--weights {path}: {error}")
        else:
            backbones[f"--weights {path}"] = loaded
            if never_trained(loaded) and set(asked.tasks or []).intersection(CLASSIFICATION):
                problems.append(
                    f"--weights {path}: {NEVER_TRAINED}, which knn, linear and semisup refuse; run these "
                    "commands with --random-init true to evaluate it"
                )
    settings = asked.pretraining
    if settings:
        name = f"--recipe {asked.recipe}"
        if asked.branch == "ema" and not settings.ema:
            problems.append(
                f"--branch ema: {name} trains without an EMA encoder; take --branch online, or "
                'let it have one: --pretrain-options "--ema"'
            )
        try:
            model = build_backbone(settings.arch, stem=settings.stem)
        except UserError as error:
            problems.append(f"{name}: {error}")
        else:
            backbones[name] = Backbone(model=model, arch=settings.arch, weights={})
    return backbones, problems


def _protocols(asked: Suite) -> list[str]:
    from transfer.evaluation.protocol import load_protocol

    problems = []
    for kind, name in asked.protocols.items():
        if any(task.startswith(kind) for task in asked.tasks or []):
            try:
                protocol = load_protocol(name, kind)
                if kind == "semisup":
                    problems += _label_shares(protocol, asked.tasks or [])
            except UserError as error:
                problems.append(f"--{kind}-protocol {name}: {error}")
    return problems


def _reproductions(asked: Suite) -> list[str]:
    """Each checkpoint has a published figure that can be reproduced."""
    if REPRODUCE not in (asked.tasks or []):
        return []
    from transfer.options.commands import ReproduceSettings
    from transfer.reproduce import planned

    problems = []
    for name in asked.weights or []:
        try:
            planned(ReproduceSettings(
                name=name.removeprefix(PREFIX), data_dir=Path(asked.data_dir or "."), zoo=asked.zoo,
                output=Path(asked.output), dataset=asked.labelled,
            ))  # fmt: skip
        except UserError as error:
            problems.append(f"--tasks {REPRODUCE}: {error}")
    return problems


def _label_shares(protocol: Protocol, wanted: list[str]) -> list[str]:
    """The protocol has learning rates for the share of labels of each semisupN task."""
    from transfer.evaluation.protocol import all_protocols
    from transfer.evaluators.semisup import FineTuneProtocol

    has = protocol.settings(FineTuneProtocol).lr_backbone
    problems = []
    for task in (t for t in wanted if t.startswith("semisup")):
        share = task.removeprefix("semisup")
        if share not in has:
            able = [str(p) for p in all_protocols() if share in p.values.get("lr_backbone", {})]
            problems.append(
                f"--tasks {task}: {protocol} has rates for {', '.join(has)} % of the labels alone; "
                f"--semisup-protocol with rates for {share} %: {', '.join(able)}"
            )
    return problems


def _detection(asked: Suite, backbones: Mapping[str, Backbone]) -> list[str]:
    """Backbones convert, configs suit them, data sets are there, as convert and train_net check it."""
    wanted = [t for t in asked.tasks or [] if t not in CLASSIFICATION]
    if not wanted:
        return []
    from transfer.conversion.availability import need_detectron2

    try:
        need_detectron2()
    except UserError as error:
        return [f"--tasks {','.join(wanted)}: {error}"]
    from transfer.conversion.layout import shape_of, to_detectron2
    from transfer.detection import config, data

    problems, records = [], {}
    for name, backbone in backbones.items():
        try:
            options = shape_of(to_detectron2(backbone.network().state_dict())).options()
            records[name] = {"arch": backbone.arch, "metadata": backbone.metadata, "options": options}
        except UserError as error:
            problems.append(f"--tasks {','.join(wanted)} with {name}: {error}")
    for task in wanted:
        file, words = tasks.detection_config(task), asked.options_of("detection")
        try:
            cfg = config.load_config(file, words)
        except UserError as error:
            problems.append(f"--tasks {task}: {error}")
            continue
        for name, record in records.items():
            try:
                config.load_config(file, words, record)
            except UserError as error:
                problems.append(f"--tasks {task} with {name}: {error}")
        try:
            data.register(asked.detection_data or [], asked.sem_seg_data or [], option="--detection-data")
            data.check(cfg, option="--detection-data")
        except UserError as error:
            problems.append(f"--tasks {task}: {error}")
    return problems


def _disk(graph: Graph, root: Path) -> list[str]:
    place = next(p for p in (root, *root.parents) if p.exists())
    free_gb = shutil.disk_usage(place).free / 1e9
    wanted_gb = CHECKPOINT_GB * sum(s.kind in ("pretrain", "semisup", "detection") for s in graph)
    if free_gb < wanted_gb:
        return [f"{place} has {free_gb:.1f} GB free, the suite may need {wanted_gb:.0f} GB"]
    return []


def _place(root: Path) -> list[str]:
    """The folder's path can stand in a job script."""
    try:
        refuse_for_sbatch("--output", str(root))
    except UserError as error:
        return [str(error)]
    return []


def _cluster(graph: Graph, resources: dict[str, Resources]) -> list[str]:
    """Partition, account and qos are known to SLURM."""
    if not has_slurm():
        return ["--cluster slurm: there is no sbatch here; run this on a login node, or take --cluster local"]
    known = {
        "partition": _lines("sinfo", "--noheader", "--format", "%R"),
        "account": _lines("sacctmgr", "--noheader", "--parsable2", "show", "account", "format=account"),
        "qos": _lines("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name"),
    }
    if known["partition"] is None:
        return ["sinfo does not answer: is the cluster up?"]
    problems: list[str] = []
    for what, names in known.items():
        asked = {getattr(resources[s.kind], what) or "" for s in graph}
        for name in sorted({part for words in asked for part in words.split(",") if part}):
            if names is not None and name not in names:
                there = ", ".join(sorted(set(names)))
                problems.append(f"{what} {name} is not known to the cluster; known: {there}")
    return problems


def _lines(*command: str) -> list[str] | None:
    """What a SLURM command prints, or None where it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [x.strip() for x in done.stdout.splitlines() if x.strip()] if done.returncode == 0 else None
