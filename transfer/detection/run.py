"""What train_net does on every rank: build a model, train it, evaluate it."""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import sha256_of, write_text
from pretrain.common.output_folder import output_folder, read_config
from transfer.detection import data
from transfer.detection.annotations.label_shares import labelled, percent_of, share_of
from transfer.detection.checkpointer import StrictCheckpointer, local_path, record_of, run_of
from transfer.detection.config import load_config, pairs, shipped
from transfer.detection.evaluation import CATEGORY, evaluate
from transfer.detection.launch import launch, world_size
from transfer.detection.pictures import draw, draw_curves, show
from transfer.detection.protocol import UNKNOWN, flat, judged, judged_otherwise, protocol_of, spell
from transfer.detection.semantic import sets
from transfer.detection.semantic.keys import is_semantic
from transfer.detection.train_loop import fine_tune
from transfer.evaluation.results import Clock, Result, append, find, read

logger = logging.getLogger(__name__)
TASKS: dict[str, Literal["detection", "segmentation", "keypoints", "semantic"]] = {
    "bbox": "detection", "segm": "segmentation", "keypoints": "keypoints", "sem_seg": "semantic"
}  # fmt: skip
RANDOM = {"path": None, "sha256": None, "format": "random initialisation", "branch": None}
JUDGED = ("config.yaml", "results.jsonl", "progress.json", "pictures", "curves.png")
TRAINED = (
    "last_checkpoint", "metrics.json", "model_last.pth", "model_best.pth", "model_final.pth",
    "model_[0-9]*.pth",
)  # fmt: skip
MENDED = "annotations"  # folder in OUTPUT_DIR of copies of annotation files that had to be mended


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, known in full before anything starts; every rank gets it."""

    args: argparse.Namespace
    cfg: CfgNode
    origin: dict[str, Any]
    """Where the backbone's weights come from."""
    protocol: dict[str, Any]
    """What the detector is trained by; for --eval-only, what it was trained by."""
    also: tuple[str, ...] = ()
    """How --eval-only's settings differ from those of the detector's own config."""
    categories: list[list[Any]]
    """(id, name) of what the classifier's outputs stand for; empty where not known."""
    config_hash: str = ""
    trained_on: tuple[str, ...] = ()
    """SHA-256 of the training sets' annotation files."""
    label_percent: float = 100
    """Share of the training labels that was used."""
    labelled: Mapping[str, Any] = field(default_factory=dict)
    """Which images a share came to, by training set."""
    warnings: Mapping[str, list[str]]
    """What is doubtful about each test set."""


def start(args: argparse.Namespace) -> int | None:
    """Check everything that can be checked, then run on every rank; with --seeds, one after the other."""
    if args.seeds is None:
        _start_one(args)
        return None
    given = pairs(args.opts)
    cfg = load_config(args.config_file, args.opts)
    first = max(cfg.SEED, 0)
    for seed in range(first, first + args.seeds):
        folder = Path(cfg.OUTPUT_DIR) / f"seed{seed}"
        words = {**given, "SEED": str(seed), "OUTPUT_DIR": str(folder)}
        opts = [word for pair in words.items() for word in pair]
        _start_one(argparse.Namespace(**{**vars(args), "opts": opts}))
    return None


def _start_one(args: argparse.Namespace) -> None:
    _log_to(None)
    opts = pairs(args.opts)
    on_cpu = args.num_gpus == 0 or opts.get("MODEL.DEVICE") == "cpu"
    ranks = world_size(args.num_gpus, args.num_machines, on_cpu=on_cpu)
    data.register(args.dataset, args.sem_seg)
    cfg = load_config(args.config_file, args.opts, ranks=ranks)
    if args.show:
        _run_one(args, cfg, ranks, on_cpu)
        return
    writes = JUDGED if args.eval_only else (*JUDGED, *TRAINED)
    main = None if args.machine_rank == 0 else False  # of detectron2's machines, or of a job's ranks
    with output_folder(cfg.OUTPUT_DIR, "transfer train-net", writes=writes, earlier=_wrote, main=main):
        _run_one(args, cfg, ranks, on_cpu)


def _wrote(folder: Path) -> bool:
    """Whether a run without a marker wrote the folder: detectron2's own config has no PROTOCOL."""
    return {"PROTOCOL", "MODEL", "SOLVER"} <= read_config(folder).keys()


def _run_one(args: argparse.Namespace, cfg: CfgNode, ranks: int, on_cpu: bool) -> None:
    if args.eval_only and args.resume:
        args.opts = [*args.opts, "MODEL.WEIGHTS", _last_model(Path(cfg.OUTPUT_DIR))]
        cfg = load_config(args.config_file, args.opts, ranks=ranks)
    cfg, asked, origin = _with_weights(args, cfg, ranks, on_cpu)
    training = not (args.eval_only or args.show)
    original = shipped(asked.PROTOCOL)
    config_hash = protocol_of(asked, original)["hash"]
    if training and args.force == "false" and _is_finished(cfg, config_hash, origin):
        print(f"{cfg.OUTPUT_DIR}: finished already (--force true runs it again)")
        return
    if training and args.force == "true":
        (Path(cfg.OUTPUT_DIR) / "last_checkpoint").unlink(missing_ok=True)
    for line in data.check(cfg, train=training, mended=Path(cfg.OUTPUT_DIR) / MENDED):
        if comm.is_main_process():
            logger.info(line)
    if args.show:
        show(cfg, Path(args.show))
        return
    also: tuple[str, ...] = ()
    if args.eval_only:
        held = run_of(cfg.MODEL.WEIGHTS)
        protocol = held.get("protocol", UNKNOWN)
        also = tuple(judged_otherwise(asked, held.get("settings", {})))
        for name in cfg.DATASETS.TEST if "categories" in held else ():
            data.same_categories("the training data", held["categories"], name, data.categories(name))
        categories, trained_on = held.get("categories", []), tuple(held.get("trained_on", ()))
        percent = percent_of(held.get("settings", {}).get("DATASETS.TRAIN", ()))
        labels = held.get("labelled", {})
        seen: list[Any] = []
    else:
        sets = {name: DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN}
        seen = list(itertools.chain(*sets.values()))
        protocol = protocol_of(asked, original, {name: len(records) for name, records in sets.items()})
        categories = [list(c) for c in data.categories(cfg.DATASETS.TRAIN[0])]
        trained_on = tuple(filter(None, map(data.digest_of, sets)))
        percent = percent_of(sets)
        labels = {name: labelled(records) for name, records in sets.items() if share_of(name)}
    doubts = {name: data.also_trained_on(name, seen, trained_on) for name in cfg.DATASETS.TEST}
    for line in itertools.chain(*doubts.values()) if comm.is_main_process() else ():
        logger.warning("%s: figures on them say what was learnt by heart", line)
    trial = Trial(
        args=args, cfg=cfg, origin=origin, protocol=protocol, also=also, categories=categories,
        config_hash=config_hash, trained_on=trained_on, label_percent=percent, labelled=labels,
        warnings=doubts,
    )  # fmt: skip
    launch(
        _on_each_rank, (trial,), num_gpus=args.num_gpus, on_cpu=on_cpu, num_machines=args.num_machines,
        machine_rank=args.machine_rank, dist_url=args.dist_url,
    )  # fmt: skip


def _last_model(output: Path) -> str:
    """The file that `--eval-only --resume` evaluates, as detectron2 chooses it."""
    try:
        return str(output / (output / "last_checkpoint").read_text().strip())
    except OSError as error:
        raise UserError(f"--eval-only --resume: {output} holds no checkpoint of a run ({error})") from error


def _with_weights(
    args: argparse.Namespace, cfg: CfgNode, ranks: int, on_cpu: bool
) -> tuple[CfgNode, CfgNode, dict[str, Any]]:
    """The config suited to weights and machine, the same as asked for, where the weights come from."""
    overrides = [*args.opts, *(("MODEL.DEVICE", "cpu") if on_cpu else ())]
    record = None
    if args.random_init:
        if "MODEL.WEIGHTS" in pairs(args.opts) and cfg.MODEL.WEIGHTS:
            raise UserError(f"--random-init and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: give one of the two")
        overrides += ["MODEL.WEIGHTS", ""]
        origin = {**RANDOM, "arch": f"resnet{cfg.MODEL.RESNETS.DEPTH}"}
    elif not cfg.MODEL.WEIGHTS:
        raise UserError(
            "no weights: add MODEL.WEIGHTS FILE.pkl (see `python -m transfer convert`), or --random-init to "
            "train from scratch on purpose"
        )
    else:
        path = local_path(cfg.MODEL.WEIGHTS)
        record = record_of(path)
        origin = record or {
            "path": cfg.MODEL.WEIGHTS, "sha256": sha256_of(path), "format": "detectron2", "branch": "online",
            "arch": f"resnet{cfg.MODEL.RESNETS.DEPTH}",
        }  # fmt: skip
    asked = load_config(args.config_file, overrides, record, ranks=ranks, to_run_here=False)
    return load_config(args.config_file, overrides, record, ranks=ranks), asked, origin


def _on_each_rank(trial: Trial) -> None:
    """Build, train, evaluate; the main rank writes results.jsonl and pictures."""
    clock, args, cfg = Clock(), trial.args, trial.cfg
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    data.register(args.dataset, args.sem_seg)  # a spawned process starts with detectron2's own data sets only
    data.use_mended(output / MENDED, names)
    if is_semantic(cfg):
        sets.name_classes(cfg, names)
    if cfg.MODEL.KEYPOINT_ON:
        for name in names:
            data.name_keypoints(name)
    _log_to(output / "log.txt")
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    torch.manual_seed(seed)
    model = build_model(cfg)

    def judge(network: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
        return {name: evaluate(cfg, network, name) for name in cfg.DATASETS.TEST}

    selection: Literal["last", "best"] = "last"
    if args.eval_only:
        if comm.is_main_process():
            write_text(output / "config.yaml", cfg.dump())
        held = StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        run, whole = held.get("run", {}), held.get("run", {}).get("settings", {}).get("SOLVER.MAX_ITER")
        seed, selection = run.get("seed", seed), run.get("selection", selection)
        iteration = min(held.get("iteration", -1) + 1, whole or cfg.SOLVER.MAX_ITER)
        if whole and iteration < whole:
            trial = replace(trial, also=(*trial.also, f"iteration {iteration} of {whole}"))
        outcomes: Mapping[str, Mapping[str, Any]] = judge(model)
    else:
        record = {
            "origin": trial.origin, "protocol": trial.protocol,
            "categories": trial.categories, "trained_on": list(trial.trained_on),
            "labelled": dict(trial.labelled),
        }  # fmt: skip
        run, outcomes = fine_tune(
            cfg, model, judge, seed=seed, record=record, resume_changed=args.resume,
            keep=args.keep_checkpoints, wandb=args.wandb,
        )  # fmt: skip
        seed, iteration = run["seed"], cfg.SOLVER.MAX_ITER
    for name in cfg.DATASETS.TEST:
        judged_by: dict[tuple[str, ...], Mapping[str, Any]] = {(): outcomes[name]}
        if cfg.TEST.AUG.ENABLED:
            judged_by[_augmentation(cfg)] = evaluate(cfg, model, name, augmented=True)
        if comm.is_main_process():
            for also, outcome in judged_by.items():
                one = replace(trial, also=(*trial.also, *also))
                for result in _results(one, name, outcome, iteration, seed, selection, clock):
                    if args.force == "true" or not find(output, result):
                        append(output, result)
                    numbers = "  ".join(f"{k} {v:.2f}" for k, v in result.metrics.items())
                    print(f"{name} {result.task}{' (augmented)' if also else ''}: {numbers}")
    if comm.is_main_process():
        draw_curves(output / "metrics.json", output / "curves.png")
        draw(cfg, model, output / "pictures")
        _verify(cfg, outcomes)


def _augmentation(cfg: CfgNode) -> tuple[str, ...]:
    """How TEST.AUG differs from a plain evaluation, in words for the protocol."""
    ours, plain = flat(cfg.TEST.AUG), flat(get_cfg().TEST.AUG)
    return tuple(
        f"TEST.AUG.{k} {spell(v)} instead of {spell(plain[k])}" for k, v in ours.items() if v != plain[k]
    )


def _verify(cfg: CfgNode, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    """TEST.EXPECTED_RESULTS, checked by detectron2 once all is written."""
    found = next(iter(outcomes.values())) if len(outcomes) == 1 else outcomes
    try:
        verify_results(cfg, found)
    except SystemExit as error:
        raise RunFailed(f"TEST.EXPECTED_RESULTS {cfg.TEST.EXPECTED_RESULTS} were not reached") from error


def _results(
    trial: Trial, name: str, outcome: Mapping[str, Mapping[str, float]], iteration: int, seed: int,
    selection: Literal["last", "best"], clock: Clock,
) -> list[Result]:  # fmt: skip
    """A result each for boxes, masks, keypoints, or for the labels of pixels.

    coco_2017_val is data set coco_2017, split val.
    """
    cfg, origin = trial.cfg, trial.origin
    dataset, _, split = name.rpartition("_")
    ranks, images = comm.get_world_size(), len(DatasetCatalog.get(name))
    heads = ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")
    parts = ("RESNETS", *(("SEM_SEG_HEAD",) if is_semantic(cfg) else heads))
    order = slice(None, None, -1 if cfg.INPUT.FORMAT == "BGR" else 1)  # mean and std are noted red first
    weights = {
        **{k: origin.get(k) for k in RANDOM},
        "mean": [round(v / 255, 6) for v in cfg.MODEL.PIXEL_MEAN[order]],
        "std": [round(v / 255, 6) for v in cfg.MODEL.PIXEL_STD[order]],
    }
    return [
        Result(
            task=TASKS[task],
            dataset=dataset or name,
            split=split,
            n=images,
            metrics={k: v for k, v in numbers.items() if not CATEGORY.match(k)},
            protocol=judged(trial.protocol, name, images, trial.also),
            weights=weights,
            arch=origin["arch"],
            label=trial.args.label,
            label_percent=trial.label_percent,
            iteration=iteration,
            selection=selection,
            seed=seed,
            image_size=cfg.INPUT.MIN_SIZE_TEST,
            warnings=trial.warnings[name],
            settings={
                "config_file": Path(trial.args.config_file).stem,
                "config_hash": trial.config_hash,
                "mixed_precision": cfg.SOLVER.AMP.ENABLED,
                "norms": {part: cfg.MODEL[part].NORM for part in parts},
                "format": cfg.INPUT.FORMAT,
                "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
                "world_size": ranks,
                **({"labelled": dict(trial.labelled)} if trial.labelled else {}),
                **_by_category(numbers),
                **({"gpus": ranks} if cfg.MODEL.DEVICE.startswith("cuda") else {}),
            },
            **clock.stamp(torch.device(cfg.MODEL.DEVICE)),
        )
        for task, numbers in outcome.items()
        if numbers
    ]


def _by_category(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """ "AP_by_category", or "IoU_by_category" and "ACC_by_category", each by the category's name."""
    found: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        if match := CATEGORY.match(key):
            found.setdefault(f"{match[1]}_by_category", {})[match[2]] = round(value, 4)
    return found or {"AP_by_category": {}}


def _is_finished(cfg: CfgNode, config_hash: str, origin: Mapping[str, Any]) -> bool:
    """Whether OUTPUT_DIR holds what this command would give: results on every test set, and pictures."""
    there = {
        f"{r.dataset}_{r.split}" if r.split else r.dataset
        for r in read(cfg.OUTPUT_DIR)
        if r.settings.get("config_hash") == config_hash
        and r.iteration == cfg.SOLVER.MAX_ITER
        and r.weights.get("sha256") == origin["sha256"]
        and cfg.SEED in (-1, r.seed)
    }
    return set(cfg.DATASETS.TEST) <= there and any(Path(cfg.OUTPUT_DIR, "pictures").glob("*.png"))


def _log_to(file: Path | None) -> None:
    """detectron2's messages go to log.txt, its errors to the screen; its important warnings (weights, data)
    are errors of ours. torch's warnings about calls inside detectron2 are left out."""
    warnings.filterwarnings("ignore", module=r"torch|detectron2")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    for name in ("detectron2", "fvcore"):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        log.propagate = False
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        screen = logging.StreamHandler()
        screen.setLevel(logging.ERROR)
        log.addHandler(screen)
        if file is not None and comm.is_main_process():
            lines = logging.FileHandler(file)
            lines.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
            log.addHandler(lines)
