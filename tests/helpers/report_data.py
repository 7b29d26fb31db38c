"""Folders as the other commands leave them, for the tests of the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.common.errors import UserError
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Result

WEIGHTS = {
    "INTL": {"path": "runs/pretrain/backbone.safetensors", "sha256": "a1" * 32, "format": "intl-bench"},
    "random control": {
        "path": "runs/control/backbone.safetensors",
        "sha256": "b2" * 32,
        "format": "intl-bench",
    },
    "raw pixels": {"path": "raw-pixels", "sha256": None, "format": "raw pixels"},
    "random initialisation": {"path": None, "sha256": None, "format": "none"},
}


def record(label: str, task: str, metrics: dict[str, float], **changes: Any) -> dict[str, Any]:
    """One line of results.jsonl, as transfer/evaluation/results.py writes it."""
    names = {"knn": "solo_knn", "linear": "cached_linear", "semisup": "intl_semisup_cosine"}
    try:
        protocol = load_protocol(f"{names[task]}@1").reference
    except (KeyError, UserError):
        protocol = {"name": names.get(task, "scenes_fpn"), "version": 1, "hash": "c3" * 6}
    values = {
        "task": task, "dataset": "fashion_mnist", "split": "test", "n": 10_000, "metrics": metrics,
        "protocol": protocol, "weights": {**WEIGHTS[label], "branch": "online"}, "arch": "resnet18",
        "label": label, "image_size": 48, "seconds": 12.5, "started_at": "2026-01-02T03:04:05+00:00",
        "device": "CPU (x86_64, 1 thread)", "versions": {"torch": "2.15.0"}, "commit": "0123456789abcdef",
    }  # fmt: skip
    return dataclasses.asdict(Result(**{**values, **changes}))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_suite(root: Path) -> Path:
    """Pretraining, k-NN, linear and detection of a finished demo."""
    for label, top1, linear in (
        ("INTL", 84.2, 86.4),
        ("random control", 80.6, 82.8),
        ("raw pixels", 80.5, 83.9),
    ):
        slug = label.replace(" ", "-").lower()
        write_lines(root / "knn" / slug / "results.jsonl", [
            record(label, "knn", {"top1_k10": top1 - 0.4, "top5_k10": 97.0, "top1_k20": top1}),
        ])  # fmt: skip
        for seed in (0, 1, 2):
            value = linear + 0.1 * seed
            write_lines(root / "linear" / slug / f"seed{seed}" / "results.jsonl", [
                record(label, "linear", {"top1": value, "top5": 99.0}, seed=seed, epoch=100, seconds=31.0),
                record(label, "linear", {"top1": value + 0.3, "top5": 99.1}, seed=seed, epoch=70,
                       selection="best", seconds=31.0),
            ])  # fmt: skip
    for label, box in (("INTL", 14.0), ("random initialisation", 6.0)):
        for seed in (0, 1):
            folder = root / "detection" / label.split()[0].lower() / f"seed{seed}"
            values = {
                "AP": box + seed,
                "AP50": 2 * box,
                "AP75": box / 2,
                "APs": box - 3,
                "APm": box,
                "APl": box + 4,
            }
            rest = {"seed": seed, "iteration": 200, "n": 100, "dataset": "scenes", "seconds": 240.0}
            write_lines(folder / "results.jsonl", [
                record(label, "detection", values, **rest),
                record(label, "segmentation", {k: v - 1 for k, v in values.items()}, **rest),
            ])  # fmt: skip
            write_lines(folder / "metrics.json", [
                {"iteration": i, "total_loss": 4 * math.exp(-i / 80) + 0.1 * seed, "lr": 0.005,
                 "bbox/AP": box * i / 200, "segm/AP": (box - 1) * i / 200}
                for i in range(19, 200, 20)
            ])  # fmt: skip
    pictures = root / "detection" / "intl" / "seed0" / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.effect_noise((256, 128), 40 + 30 * i).convert("RGB").save(pictures / f"scene{i}.png")
    write_lines(root / "pretrain" / "metrics.jsonl", [
        {"step": step, "epoch": step // 20, "loss": 30 - 4 * math.log1p(step),
         "loss_minus_floor": 9 - math.log1p(step), "alignment": 2 / (1 + step / 100),
         "trace": 240.0 - step / 20, "lr": 0.1 * math.cos(step / 400),
         "images_per_s": 410.0, "condition_number": 1e4 / (1 + step / 30), "stable_rank": 1.0 + step / 90,
         "largest_share": 0.9 / (1 + step / 60), "rankme": 20.0 + step / 9, "row_condition_number": 80.0,
         "row_entropy_rank": 30.0 + step / 12}
        for step in range(0, 400, 10)
    ])  # fmt: skip
    return root
