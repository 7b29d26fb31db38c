"""What train_net does on every rank: build a model, train it, evaluate it."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of, write_text
from transfer.detection import data
from transfer.detection.checkpointer import StrictCheckpointer, local_path, record_of
from transfer.detection.config import load_config, pairs, protocol_of
from transfer.detection.evaluation import evaluate
from transfer.detection.launch import launch, world_size
from transfer.detection.pictures import draw, draw_curves, show
from transfer.detection.train_loop import fine_tune
from transfer.evaluation.results import Clock, Result, append, find, read

logger = logging.getLogger(__name__)
TASKS: dict[str, Literal["detection", "segmentation"]] = {"bbox": "detection", "segm": "segmentation"}
RANDOM = {"path": None, "sha256": None, "format": "random initialisation", "branch": None}


def start(args: argparse.Namespace) -> int | None:
    """Check everything that can be checked, then run on every rank."""
    _log_to(None)
    opts = pairs(args.opts)
    on_cpu = args.num_gpus == 0 or opts.get("MODEL.DEVICE") == "cpu"
    ranks = world_size(args.num_gpus, args.num_machines, on_cpu=on_cpu)
    data.register(args.dataset)
    cfg = load_config(args.config_file, args.opts, ranks=ranks)
    cfg, origin = _with_weights(args, cfg, ranks, on_cpu)
    training = not (args.eval_only or args.show)
    if training and args.force == "false" and _is_finished(cfg, origin):
        print(f"{cfg.OUTPUT_DIR}: finished already (--force true runs it again)")
        return None
    if training and args.force == "true":
        (Path(cfg.OUTPUT_DIR) / "last_checkpoint").unlink(missing_ok=True)
    for line in data.check(cfg, train=training):
        if comm.is_main_process():
            logger.info(line)
    if args.show:
        show(cfg, Path(args.show))
        return None
    launch(
        _on_each_rank, (args, cfg, origin), num_gpus=args.num_gpus, on_cpu=on_cpu,
        num_machines=args.num_machines, machine_rank=args.machine_rank, dist_url=args.dist_url,
    )  # fmt: skip
    return None


def _with_weights(
    args: argparse.Namespace, cfg: CfgNode, ranks: int, on_cpu: bool
) -> tuple[CfgNode, dict[str, Any]]:
    """The config made to suit the weights, and where these come from."""
    overrides = [*args.opts, *(("MODEL.DEVICE", "cpu") if on_cpu else ())]
    if args.random_init:
        if "MODEL.WEIGHTS" in pairs(args.opts) and cfg.MODEL.WEIGHTS:
            raise UserError(f"--random-init and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: give one of the two")
        cfg = load_config(args.config_file, [*overrides, "MODEL.WEIGHTS", ""], ranks=ranks)
        return cfg, {**RANDOM, "arch": f"resnet{cfg.MODEL.RESNETS.DEPTH}"}
    if not cfg.MODEL.WEIGHTS:
        raise UserError(
            "no weights: add MODEL.WEIGHTS FILE.pkl (see `python -m transfer convert`), or --random-init to "
            "train from scratch on purpose"
        )
    path = local_path(cfg.MODEL.WEIGHTS)
    record = record_of(path)
    origin = record or {
        "path": cfg.MODEL.WEIGHTS, "sha256": sha256_of(path), "format": "detectron2", "branch": "online",
        "arch": f"resnet{cfg.MODEL.RESNETS.DEPTH}",
    }  # fmt: skip
    return load_config(args.config_file, overrides, record, ranks=ranks), origin


def _on_each_rank(args: argparse.Namespace, cfg: CfgNode, origin: dict[str, Any]) -> None:
    """Build, train, evaluate; the main rank writes results.jsonl and pictures."""
    clock = Clock()
    data.register(args.dataset)  # a spawned process starts with detectron2's own data sets only
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    _log_to(output / "log.txt")
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    torch.manual_seed(seed)
    model = build_model(cfg)

    def judge(network: nn.Module) -> dict[str, dict[str, float]]:
        return evaluate(cfg, network, cfg.DATASETS.TEST[0])

    if args.eval_only:
        if comm.is_main_process():
            write_text(output / "config.yaml", cfg.dump())
        held = StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        iteration, seed = held.get("iteration", -1) + 1, held.get("run", {}).get("seed", seed)
    else:
        seed = fine_tune(cfg, model, judge, seed=seed, origin=origin, resume_changed=args.resume)["seed"]
        iteration = cfg.SOLVER.MAX_ITER
    for name in cfg.DATASETS.TEST:
        outcome = evaluate(cfg, model, name)
        if comm.is_main_process():
            results = _results(args, cfg, origin, name, outcome, iteration, seed, clock)
            for result in results:
                if args.eval_only and find(output, result):
                    continue
                append(output, result)
            for result in results:
                numbers = "  ".join(f"{k} {v:.2f}" for k, v in result.metrics.items())
                print(f"{name} {result.task}: {numbers}")
    if comm.is_main_process():
        draw(cfg, model, output / "pictures")
        draw_curves(output / "metrics.json", output / "curves.png")


def _results(
    args: argparse.Namespace, cfg: CfgNode, origin: Mapping[str, Any], name: str,
    outcome: Mapping[str, Mapping[str, float]], iteration: int, seed: int, clock: Clock,
) -> list[Result]:  # fmt: skip
    """A result for boxes and one for masks. coco_2017_val is data set coco_2017, split val."""
    dataset, _, split = name.rpartition("_")
    ranks = comm.get_world_size()
    norms = {part: cfg.MODEL[part].NORM for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
    return [
        Result(
            task=TASKS[task],
            dataset=dataset or name,
            split=split,
            n=len(DatasetCatalog.get(name)),
            metrics=dict(metrics),
            protocol=protocol_of(cfg),
            weights={k: origin.get(k) for k in RANDOM},
            arch=origin["arch"],
            label=args.label,
            iteration=iteration,
            seed=seed,
            image_size=cfg.INPUT.MIN_SIZE_TEST,
            settings={
                "config_file": Path(args.config_file).stem,
                "mixed_precision": cfg.SOLVER.AMP.ENABLED,
                "norms": norms,
                "world_size": ranks,
                **({"gpus": ranks} if cfg.MODEL.DEVICE.startswith("cuda") else {}),
            },
            **clock.stamp(torch.device(cfg.MODEL.DEVICE)),
        )
        for task, metrics in outcome.items()
        if metrics
    ]


def _is_finished(cfg: CfgNode, origin: Mapping[str, Any]) -> bool:
    """Whether OUTPUT_DIR holds the results that this command would give."""
    return any(
        r.protocol == protocol_of(cfg)
        and r.iteration == cfg.SOLVER.MAX_ITER
        and r.weights.get("sha256") == origin["sha256"]
        and cfg.SEED in (-1, r.seed)
        for r in read(cfg.OUTPUT_DIR)
    )


def _log_to(file: Path | None) -> None:
    """detectron2's own messages go to log.txt, its errors to the screen: what it only warns of and matters
    (weights, data) is an error of ours. Warnings of torch about calls inside detectron2 are left out."""
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
            log.addHandler(logging.FileHandler(file))
