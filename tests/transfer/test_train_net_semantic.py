"""Semantic segmentation by train_net as a user calls it: scores, pictures, going on, ranks, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from PIL import Image

from pretrain.common.cli import EXIT_STOPPED, EXIT_USAGE, run
from pretrain.common.files import read_jsonl
from tests.helpers.pixel_data import IGNORED, write_pixels
from tests.helpers.ranks import run_on_ranks
from transfer import train_net
from transfer.conversion import convert
from transfer.detection import run as detection_run
from transfer.detection import train_loop
from transfer.detection.config import load_config
from transfer.report import command as report

TINY = [
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "8", "MODEL.SEM_SEG_HEAD.AUX_DIM", "8",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4",
    "INPUT.MIN_SIZE_TRAIN", "(40,60)", "INPUT.MIN_SIZE_TEST", "32", "INPUT.CROP.SIZE", "(32,32)",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3",
]  # fmt: skip
LINEAR = [w for pair in zip(TINY[4::2], TINY[5::2]) for w in pair]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pixels")
    write_pixels(root / "train", 5)
    write_pixels(root / "test", 3, seed=1)
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), root / "resnet18.pth")
    words = ["--weights", str(root / "resnet18.pth"), "--output", str(root / "w.pkl"), "--no-verify"]
    assert run(convert.main, words) == 0
    return root


def words(folder: Path, output: Path, *more: str, config: str = "small_R18_FCN") -> list[str]:
    """A small run's command line; options of train_net first, KEY VALUE pairs after them."""
    sets = [f"--sem-seg=small_{s}={folder / s / 'images'}:{folder / s / 'masks'}" for s in ("train", "test")]
    options = ["--config-file", config, "--num-gpus", "0", *sets, *(w for w in more if w.startswith("--"))]
    pairs = [*(TINY if "FCN" in config else LINEAR), *(w for w in more if not w.startswith("--"))]
    if "--random-init" not in more and "MODEL.WEIGHTS" not in more:
        pairs += ["MODEL.WEIGHTS", str(folder / "w.pkl")]
    return [*options, *pairs, "OUTPUT_DIR", str(output)]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "INTL"
    assert run(train_net.main, words(folder, output, "--label=INTL", "TEST.EVAL_PERIOD", "2")) == 0
    return output


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures and curves, which take as long as all the rest of so small a run."""
    for name in ("draw", "draw_curves"):
        monkeypatch.setattr(detection_run, name, lambda *_: None)


def counted(folder: Path, model: Path) -> dict[str, float]:
    """mIoU and mean accuracy by sets of pixels, from another pass through the network."""
    network = build_model(load_config("small_R18_FCN", TINY)).eval()
    network.load_state_dict(torch.load(model, weights_only=True)["model"])
    truth: dict[int, set[Any]] = {k: set() for k in range(4)}
    guess: dict[int, set[Any]] = {k: set() for k in range(4)}
    for file in sorted((folder / "test" / "images").iterdir()):
        image = Image.open(file)
        width, height = image.size  # 52 x 44; the short side becomes 32, the long one 52 * 32 / 44 = 37.8
        x = torch.from_numpy(cv2.resize(np.array(image), (38, 32))).permute(2, 0, 1)
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
        )
        with torch.no_grad():
            logits = network.sem_seg_head(network.backbone(((x - mean) / std)[None]))
            for size in ((32, 38), (height, width)):
                logits = F.interpolate(logits, size=size, mode="bilinear")
        found = logits[0].argmax(0).numpy()
        labels = np.array(Image.open(folder / "test" / "masks" / f"{file.stem}.png"))
        for y, x_ in np.ndindex(height, width):
            if labels[y, x_] != IGNORED:
                truth[int(labels[y, x_])].add((file.stem, y, x_))
                guess[int(found[y, x_])].add((file.stem, y, x_))
    ious = [len(truth[k] & guess[k]) / len(truth[k] | guess[k]) for k in range(4)]
    accuracies = [len(truth[k] & guess[k]) / len(truth[k]) for k in range(4)]
    return {
        "mIoU": 100 * sum(ious) / 4,
        "mACC": 100 * sum(accuracies) / 4,
        **{f"class {k}": 100 * ious[k] for k in range(4)},
    }


def test_scores_equal_a_count_of_single_pixels_at_the_masks_own_size(finished: Path, folder: Path) -> None:
    (line,) = read_jsonl(finished / "results.jsonl")
    expected = counted(folder, finished / "model_final.pth")
    assert {k: line["metrics"][k] for k in ("mIoU", "mACC")} == pytest.approx(
        {k: expected.pop(k) for k in ("mIoU", "mACC")}
    )
    assert line["settings"]["IoU_by_category"] == pytest.approx(expected, abs=1e-4)
    assert line["metrics"].keys() == {"mIoU", "mACC", "pACC", "fwIoU"} and line["metrics"]["mIoU"] > 0
    assert (line["task"], line["dataset"], line["split"], line["n"]) == ("semantic", "small", "test", 3)
    assert line["protocol"]["name"] == "small_R18_FCN" and line["iteration"] == 3
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES 4 instead of 21" in line["protocol"]["differs"]
    assert line["settings"]["norms"] == {"RESNETS": "naiveSyncBN", "SEM_SEG_HEAD": "naiveSyncBN"}
    metrics = {m["iteration"]: m for m in read_jsonl(finished / "metrics.json")}
    assert [i for i, m in metrics.items() if "sem_seg/mIoU" in m] == [1, 3]
    assert metrics[3]["sem_seg/mIoU"] == line["metrics"]["mIoU"]
    assert {"loss_sem_seg", "loss_sem_seg_aux", "lr"} <= metrics[2].keys()
    assert (finished / "model_best.pth").exists() and (finished / "curves.png").exists()
    with Image.open(finished / "pictures" / "predictions_0.png") as picture:
        assert picture.size == (2 * 453 + 8, 384)  # 52 x 44 enlarged to 384 px, twice


@pytest.mark.usefixtures("undrawn")
def test_evaluating_the_saved_model_gives_the_same_numbers(
    finished: Path, folder: Path, tmp_path: Path
) -> None:
    model = str(finished / "model_final.pth")
    assert run(train_net.main, words(folder, tmp_path / "a", "--eval-only", "MODEL.WEIGHTS", model)) == 0
    (before,), (again,) = (read_jsonl(f / "results.jsonl") for f in (finished, tmp_path / "a"))
    assert again["metrics"] == before["metrics"] and again["protocol"] == before["protocol"]
    flags = ("--eval-only", "MODEL.WEIGHTS", model, "TEST.FLIP", "True", "TEST.SLIDE.WINDOW", "24")
    assert run(train_net.main, words(folder, tmp_path / "b", *flags, "TEST.SLIDE.STRIDE", "16")) == 0
    (other,) = read_jsonl(tmp_path / "b" / "results.jsonl")
    assert other["metrics"] != before["metrics"]
    said = ("TEST.FLIP True", "False"), ("TEST.SLIDE.STRIDE 16", "0"), ("TEST.SLIDE.WINDOW 24", "0")
    assert {f"{a} at evaluation instead of {b}" for a, b in said} <= set(other["protocol"]["differs"])


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_goes_on_to_the_bit(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    agree, calls = train_loop._agree, []

    def signalled(losses: Any, stop: bool) -> Any:
        calls.append(1)
        return agree(losses, stop or len(calls) == 2)

    monkeypatch.setattr(train_loop, "_agree", signalled)
    assert run(train_net.main, words(folder, tmp_path)) == EXIT_STOPPED
    monkeypatch.setattr(train_loop, "_agree", agree)
    assert run(train_net.main, words(folder, tmp_path)) == 0
    ours, theirs = (
        torch.load(f / "model_final.pth", weights_only=True)["model"] for f in (tmp_path, finished)
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def _inside_a_job(argv: list[str]) -> None:
    assert run(train_net.main, argv) == 0


@pytest.mark.usefixtures("undrawn")
def test_ranks_count_each_image_once(finished: Path, folder: Path, tmp_path: Path) -> None:
    model = str(finished / "model_final.pth")
    run_on_ranks(2, _inside_a_job, words(folder, tmp_path / "o", "--eval-only", "MODEL.WEIGHTS", model))
    (before,), (ranks,) = (read_jsonl(f / "results.jsonl") for f in (finished, tmp_path / "o"))
    assert ranks["metrics"] == before["metrics"] and ranks["settings"]["world_size"] == 2  # of three images


@pytest.mark.usefixtures("undrawn")
def test_a_linear_head_on_a_frozen_network_and_the_report(
    finished: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "linear"
    argv = words(folder, output, "--label=INTL", config="small_R18_linear")
    assert run(train_net.main, argv) == 0
    (line,) = read_jsonl(output / "results.jsonl")
    assert line["protocol"]["name"] == "small_R18_linear" and line["metrics"]["mIoU"] > 0
    state = torch.load(output / "model_final.pth", weights_only=True)["model"]
    before = timm.create_model("resnet18", num_classes=0)
    before.load_state_dict(torch.load(folder / "resnet18.pth", weights_only=True))
    assert torch.equal(state["backbone.res5.1.conv2.weight"], before.layer4[1].conv2.weight)
    assert torch.equal(state["backbone.res5.1.conv2.norm.running_mean"], before.layer4[1].bn2.running_mean)
    assert run(report.main, [str(finished), str(output), "--output", str(tmp_path / "report")]) == 0
    table = (tmp_path / "report" / "tables" / "verdict.csv").read_text()
    assert "Semantic" in table and f"{line['metrics']['mIoU']:.2f}" in table
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Semantic segmentation: mean IoU" in page  # the curve, of the run that was evaluated on the way


def test_what_is_wrong_is_said_before_training(folder: Path, tmp_path: Path, capsys: Any) -> None:
    detector = ["MODEL.WEIGHTS", str(folder / "w.pkl"), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    assert run(train_net.main, words(folder, tmp_path / "o", *detector)) == EXIT_USAGE
    assert "masks hold labels beyond 0 to 2" in capsys.readouterr().err
    assert not (tmp_path / "o" / "model_final.pth").exists()
