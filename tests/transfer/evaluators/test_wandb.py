"""Each epoch of a linear probe and of a fine-tuning goes to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb.sdk.wandb_run import Run

from tests.helpers.tiny_resnet import save_tiny
from transfer.__main__ import main
from transfer.evaluation import results

VALUES: dict[str, dict[str, Any]] = {
    "linear": {"augmentation": False, "learning_rates": [0.1, 0.01], "batch": 64, "choose_on": "reported"},
    "semisup": {"lr_backbone": {"10": 0.01}, "lr_head": {"10": 0.1}, "batch": 16},
}


def words(task: str, folder: Path, data: Path, **values: object) -> list[str]:
    content = {"task": task, "title": "t", "source": "s", "values": {**VALUES[task], "epochs": 2, **values}}
    (folder / "tiny@1.yaml").write_text(yaml.safe_dump(content))
    weights = save_tiny(folder / "w.safetensors") if task == "semisup" else "raw-pixels"
    return [
        task, "--weights", str(weights), "--protocol", str(folder / "tiny@1.yaml"), "--workers", "0",
        "--dataset", "cifar10", "--data-dir", str(data), "--output", str(folder / "out"), "--wandb", "probes",
        *(["--label-percent", "10"] if task == "semisup" else []),
    ]  # fmt: skip


@pytest.mark.parametrize("task", VALUES)
def test_every_epoch_is_logged(
    task: str, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[tuple[str, int, dict[str, float]]] = []
    log = Run.log

    def look(run: Run, data: dict[str, float], *, step: int, **more: Any) -> None:
        logged.append((run.id, step, dict(data)))
        log(run, data, step=step, **more)

    monkeypatch.setattr(Run, "log", look)
    assert main(words(task, tmp_path, cifar_folder)) == 0
    output = tmp_path / "out"
    ours = (output / "wandb_id").read_text().strip()
    assert [(run, step) for run, step, _ in logged] == [(ours, 1), (ours, 2)]
    assert wandb.run is None and list((output / "wandb").glob(f"offline-run-*-{ours}"))
    last = next(r for r in results.read(output) if r.epoch == 2 or r.selection == "last")
    if task == "semisup":
        assert logged[1][2]["top1"] == pytest.approx(last.metrics["top1"], abs=1e-4)
    best = max(r.metrics["top1"] for r in results.read(output))
    assert max(values["top1"] for _, _, values in logged) == pytest.approx(best, abs=1e-4)
    assert all("loss" in values or "train_loss" in values for _, _, values in logged)


def test_what_has_no_epochs_is_not_logged(cifar_folder: Path, tmp_path: Path, capsys) -> None:
    again = words("linear", tmp_path, cifar_folder, method="logreg", costs=[1.0], learning_rates=[])
    assert main(again) == 2
    assert "--wandb probes: tiny@1 has no epochs that could be logged" in capsys.readouterr().err
