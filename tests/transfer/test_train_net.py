"""train_net as a user calls it, on composed scenes: training, going on, evaluation, refusals, ranks, VOC."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from pretrain.common.cli import EXIT_STOPPED, EXIT_USAGE, run
from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl, sha256_of
from pretrain.common.process_group import is_on, rank
from pretrain.common.signals import StopSignals
from pretrain.metrics import start_wandb
from tests.helpers.ranks import run_on_ranks
from transfer import train_net
from transfer.conversion import convert, layout, weights_file
from transfer.conversion.availability import CONFIGS
from transfer.conversion.weights_file import read_pickle
from transfer.detection import precise_bn, scenes, train_loop
from transfer.detection.batches import index_batches
from transfer.detection.config import load_config, shipped
from transfer.detection.data import check, register
from transfer.detection.protocol import protocol_of
from transfer.detection.semantic.keys import is_semantic

TINY = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "TEST.PRECISE_BN.NUM_ITER", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene_folder(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    return scenes.compose(fashion_mnist_dir, folder, train=9, test=3, size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted ResNet-18."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), folder / "resnet18.pth")
    words = ["--weights", str(folder / "resnet18.pth"), "--output", str(folder / "w.pkl"), "--no-verify"]
    assert run(convert.main, words) == 0
    return folder / "w.pkl"


def words(scene_folder: Path, output: Path, *more: str) -> list[str]:
    """A small run's command line; options of train_net first, KEY VALUE pairs after them."""
    options = [w for w in more if w.startswith("--")]
    pairs = [w for w in more if not w.startswith("--")]
    datasets = [f"scenes_{s}={scene_folder / s}.json:{scene_folder / s}" for s in ("train", "test")]
    flags = ["--config-file", "scenes_R18_FPN", "--num-gpus", "0"]
    return [
        *flags,
        "--dataset",
        datasets[0],
        "--dataset",
        datasets[1],
        *options,
        *TINY,
        *pairs,
        "OUTPUT_DIR",
        str(output),
    ]


@pytest.fixture(scope="module")
def finished(scene_folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four iterations."""
    output = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--label=INTL", "--keep-checkpoints=2", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "2")
    argv = words(scene_folder, output, *flags, "MODEL.WEIGHTS", str(weights))
    assert run(train_net.main, argv) == 0
    return output


def test_a_run_leaves_results_pictures_and_curves(
    finished: Path, scene_folder: Path, weights: Path, capsys: Any
) -> None:
    lines = read_jsonl(finished / "results.jsonl")
    assert [line["task"] for line in lines] == ["detection", "segmentation"]
    for line in lines:
        assert {"AP", "AP50", "AP75"} <= line["metrics"].keys()
        assert line["n"] == 3 and line["iteration"] == 4 and line["seed"] == 0
        assert (line["dataset"], line["split"], line["label"]) == ("scenes", "test", "INTL")
        assert line["protocol"]["name"] == "scenes_R18_FPN" and line["arch"] == "resnet18"
        origin = weights_file.read_pickle(weights)["origin"]
        assert {k: line["weights"][k] for k in ("path", "sha256", "format", "branch")} == {
            k: origin[k] for k in ("path", "sha256", "format", "branch")
        }
    progress = json.loads((finished / "progress.json").read_text())
    assert (progress["label"], progress["done"], progress["total"]) == ("evaluating on scenes_test", 3, 3)
    assert [m["iteration"] for m in read_jsonl(finished / "metrics.json")] == [0, 1, 2, 3, 4]
    assert (finished / "pictures" / "predictions_0.png").exists() and (finished / "curves.png").exists()
    assert not (finished / "model_last.pth").exists()
    assert sorted(f.name for f in finished.glob("*.pth")) == [
        "model_0000001.pth", "model_0000002.pth", "model_best.pth", "model_final.pth"
    ]  # fmt: skip
    best = torch.load(finished / "model_best.pth", weights_only=True)
    assert best["run"]["selection"] == "best" and best["run"]["protocol"] == lines[0]["protocol"]

    argv = words(scene_folder, finished, "MODEL.WEIGHTS", str(weights))
    (finished / "curves.png").unlink()  # as a kill before the drawing leaves it
    shutil.rmtree(finished / "pictures")
    assert run(train_net.main, argv) == 0
    assert (finished / "pictures" / "predictions_0.png").exists() and (finished / "curves.png").exists()
    capsys.readouterr()
    assert run(train_net.main, argv) == 0
    assert "finished already" in capsys.readouterr().out
    assert read_jsonl(finished / "results.jsonl") == lines


def test_a_run_writes_what_a_detectron2_user_looks_for(finished: Path) -> None:
    metrics = {m["iteration"]: m for m in read_jsonl(finished / "metrics.json")}
    assert [i for i, m in metrics.items() if "bbox/AP" in m] == [1, 4]  # every second, and at the end
    result = read_jsonl(finished / "results.jsonl")[0]
    assert metrics[4]["bbox/AP"] == result["metrics"]["AP"]
    assert metrics[4]["bbox/AR100"] == result["metrics"]["AR100"]
    by_category = result["settings"]["AP_by_category"]
    assert metrics[4]["bbox/AP-Sneaker"] == pytest.approx(by_category["Sneaker"], abs=1e-4)
    assert result["metrics"]["AP"] == pytest.approx(sum(by_category.values()) / len(by_category), abs=1e-3)
    assert {"time", "data_time", "max_mem", "eta_seconds", "lr", "total_loss"} <= metrics[3].keys()
    log = (finished / "log.txt").read_text()
    assert "iter: 3" in log and "data_time:" in log and "loss_mask:" in log
    assert list((finished / "tensorboard").glob("events.*"))


def test_several_test_sets_are_judged_on_the_way_and_told_to_weights_and_biases(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second set is a part of the first, and the third has the training images, which is told."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told: list[dict[str, Any]] = []

    def watched(*given: Any) -> Any:
        begun = start_wandb(*given)
        log = begun.log
        begun.log = lambda values, **more: (told.append(dict(values)), log(values, **more))
        return begun

    monkeypatch.setattr(train_loop, "start_wandb", watched)
    part = json.loads((scene_folder / "test.json").read_text())
    part["images"] = part["images"][:2]
    kept = {image["id"] for image in part["images"]}
    part["annotations"] = [a for a in part["annotations"] if a["image_id"] in kept]
    (tmp_path / "part.json").write_text(json.dumps(part))
    (tmp_path / "copy.json").write_bytes((scene_folder / "train.json").read_bytes())
    (tmp_path / "images").symlink_to(scene_folder / "train")
    sets = [f"some_part={tmp_path}/part.json:{scene_folder}/test"]
    sets += [f"train_again={tmp_path}/copy.json:{tmp_path}/images"]
    flags = ["--wandb=intl", "--random-init", *(f"--dataset={s}" for s in sets)]
    brief = ["SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1", "TEST.PRECISE_BN.ENABLED", "False"]
    names = ["scenes_test", "some_part", "train_again"]
    argv = words(scene_folder, tmp_path / "o", *flags, *brief, "DATASETS.TEST", str(tuple(names)))
    assert run(train_net.main, argv) == 0
    metrics = [m for m in read_jsonl(tmp_path / "o" / "metrics.json") if "scenes_test/bbox/AP" in m]
    assert [m["iteration"] for m in metrics] == [0, 2]  # after the first, and at the end
    results = read_jsonl(tmp_path / "o" / "results.jsonl")
    assert [(f"{r['dataset']}_{r['split']}", r["task"], r["n"]) for r in results] == [
        (name, task, {"scenes_test": 3, "some_part": 2, "train_again": 9}[name])
        for name in names for task in ("detection", "segmentation")
    ]  # fmt: skip
    for r in results:
        key = f"{r['dataset']}_{r['split']}/{'bbox' if r['task'] == 'detection' else 'segm'}/AP"
        assert r["metrics"]["AP"] == metrics[-1][key]
        assert [t[key] for t in told if key in t] == [m[key] for m in metrics]
        assert ("100 % of the images of train_again are training images" in str(r["warnings"])) == (
            r["dataset"] == "train"
        )
    assert all("total_loss" in t for t in told[:2])
    ours = (tmp_path / "o" / "wandb_id").read_text().strip()
    assert list((tmp_path / "o" / "wandb").glob(f"offline-run-*-{ours}/run-{ours}.wandb"))
    best = torch.load(tmp_path / "o" / "model_best.pth", weights_only=True)["run"]["trained_on"]
    assert best == [sha256_of(scene_folder / "train.json")]  # known where the model is judged elsewhere
    elsewhere = shutil.copytree(scene_folder / "train", tmp_path / "elsewhere")
    again = [f"--dataset=train_again={tmp_path}/copy.json:{elsewhere}", "--eval-only", "MODEL.WEIGHTS"]
    again += [str(tmp_path / "o" / "model_final.pth"), "DATASETS.TEST", "('train_again',)"]
    assert run(train_net.main, words(scene_folder, tmp_path / "e", *again)) == 0
    judged = read_jsonl(tmp_path / "e" / "results.jsonl")
    assert [(r["metrics"], r["warnings"]) for r in judged] == [
        (r["metrics"], r["warnings"]) for r in results if r["dataset"] == "train"
    ]


def test_seeds_are_trials_in_folders_of_their_own(scene_folder: Path, tmp_path: Path) -> None:
    brief = ("SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False", "MODEL.MASK_ON", "False")
    assert run(train_net.main, words(scene_folder, tmp_path, "--random-init", "--seeds=2", *brief)) == 0
    assert [read_jsonl(tmp_path / f"seed{s}" / "results.jsonl")[0]["seed"] for s in (0, 1)] == [0, 1]
    first, second = (torch.load(tmp_path / f"seed{s}" / "model_final.pth", weights_only=True) for s in (0, 1))
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(first["model"][name], second["model"][name])


def test_a_share_of_the_labels_is_told_by_results_and_model(scene_folder: Path, tmp_path: Path) -> None:
    """First 40 % of 9 images are 3; a second run of the same goes on as a finished one."""
    brief = ("SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False", "MODEL.MASK_ON", "False")
    part = ("DATASETS.TRAIN", "('scenes_train.first@40',)")
    assert run(train_net.main, words(scene_folder, tmp_path / "o", "--random-init", *brief, *part)) == 0
    again = ("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "o" / "model_final.pth"), *brief)
    assert run(train_net.main, words(scene_folder, tmp_path / "e", *again)) == 0
    (trained,), (judged,) = (read_jsonl(tmp_path / f / "results.jsonl") for f in "oe")
    ids = sorted(i["id"] for i in json.loads((scene_folder / "train.json").read_text())["images"])[:3]
    digest = hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
    for result in (trained, judged):
        assert result["label_percent"] == 40
        assert result["settings"]["labelled"] == {
            "scenes_train.first@40": {"images": 3, "ids_sha256": digest}
        }
        assert "DATASETS.TRAIN (scenes_train.first@40,) instead of (scenes_train,)" in str(result["protocol"])
    assert judged["metrics"] == trained["metrics"] and judged["protocol"] == trained["protocol"]


def test_evaluating_the_saved_model_gives_the_same_numbers(
    finished: Path, scene_folder: Path, tmp_path: Path
) -> None:
    model = str(finished / "model_final.pth")
    assert run(train_net.main, words(scene_folder, tmp_path, "--eval-only", "MODEL.WEIGHTS", model)) == 0
    shutil.copy(model, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert (
        run(train_net.main, words(scene_folder, tmp_path, "--eval-only", "--resume")) == 0
    )  # the same again
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 2
    again, before = read_jsonl(tmp_path / "results.jsonl"), read_jsonl(finished / "results.jsonl")
    assert [a["metrics"] for a in again] == [b["metrics"] for b in before]
    assert again[0]["weights"] == before[0]["weights"] and again[0]["iteration"] == 4
    assert again[0]["protocol"] == before[0]["protocol"]  # of the training, one column
    content = torch.load(model, weights_only=True)
    stranger = tmp_path / "stranger.pth"
    torch.save({"model": content["model"]}, stranger)
    flags = ("--eval-only", "MODEL.WEIGHTS", str(stranger), "TEST.AUG.ENABLED", "True")
    augmented = ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False")  # that is, as without
    assert run(train_net.main, words(scene_folder, tmp_path / "s", *flags, *augmented)) == 0
    found = read_jsonl(tmp_path / "s" / "results.jsonl")
    assert [f["protocol"]["name"] for f in found] == ["unknown"] * 4
    assert "differs" not in found[0]["protocol"]
    assert found[2]["protocol"]["differs"] == [
        "TEST.AUG.ENABLED True instead of False",
        "TEST.AUG.MIN_SIZES (64,) instead of (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)",
        "TEST.AUG.FLIP False instead of True",
    ]
    assert found[2]["metrics"].keys() == found[0]["metrics"].keys()
    pictures = tmp_path / "pictures"
    argv = words(scene_folder, tmp_path / "o", f"--show={pictures}", "MODEL.WEIGHTS", model)
    assert run(train_net.main, argv) == 0
    assert len(list(pictures.glob("predictions_*.png"))) == 3 and (pictures / "curves.png").exists()


def test_a_finished_run_is_not_lengthened_without_its_optimizer(
    finished: Path, scene_folder: Path, weights: Path, capsys: Any
) -> None:
    longer = words(scene_folder, finished, "--resume", "MODEL.WEIGHTS", str(weights), "SOLVER.MAX_ITER", "6")
    before = (finished / "config.yaml").read_text()
    assert "finished run of 4 iterations" in refused(longer, capsys)
    assert (finished / "config.yaml").read_text() == before


def test_the_real_predictions_score_as_with_pycocotools(finished: Path, scene_folder: Path) -> None:
    from tests.transfer.detection.test_evaluation import by_pycocotools

    results = json.loads((finished / "inference" / "coco_instances_results.json").read_text())
    for line, task in zip(read_jsonl(finished / "results.jsonl"), ("bbox", "segm")):
        theirs = 100 * by_pycocotools(scene_folder / "test.json", results, task)
        assert line["metrics"]["AP"] == pytest.approx(theirs[0], abs=1e-4)


def test_a_stopped_run_goes_on_to_the_bit(
    finished: Path, scene_folder: Path, weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    argv = words(scene_folder, tmp_path, "MODEL.WEIGHTS", str(weights), "SOLVER.CHECKPOINT_PERIOD", "1000")
    agree, calls = train_loop._agree, []

    def signalled(losses: Any, stop: bool) -> Any:
        calls.append(1)
        return agree(losses, stop or len(calls) == 2)

    monkeypatch.setattr(train_loop, "_agree", signalled)
    assert run(train_net.main, argv) == EXIT_STOPPED
    assert (tmp_path / "last_checkpoint").read_text() == "model_last.pth"
    assert not (tmp_path / "results.jsonl").exists()
    monkeypatch.setattr(train_loop, "_agree", agree)
    argv += ["TEST.EVAL_PERIOD", "3"]  # no part of what is learned
    assert run(train_net.main, argv) == 0
    ours = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    theirs = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    metrics = [r["metrics"] for r in read_jsonl(tmp_path / "results.jsonl")]
    assert metrics == [r["metrics"] for r in read_jsonl(finished / "results.jsonl")]


def test_another_runs_checkpoint_is_not_gone_on_from(
    scene_folder: Path, weights: Path, tmp_path: Path, capsys: Any
) -> None:
    record = {"seed": 0, "settings": {"SOLVER.BASE_LR": 0.02, "SEED": 0}, "origin": {"sha256": "a"}}
    now = {**record, "settings": {"SOLVER.BASE_LR": 0.01, "SEED": 0}, "origin": {"sha256": "b"}}
    with pytest.raises(UserError, match=r"SOLVER.BASE_LR, the content of MODEL.WEIGHTS differ;"):
        train_loop._refuse_another_run(record, now, tmp_path, False)
    train_loop._refuse_another_run(record, now, tmp_path, True)
    train_loop._refuse_another_run(record, record, tmp_path, False)


# --- what is refused before anything starts


def refused(argv: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert run(train_net.main, argv) == EXIT_USAGE
    return capsys.readouterr().err


def test_weights_must_fit(scene_folder: Path, weights: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o"
    assert "no weights" in refused(words(scene_folder, out), capsys)
    both = words(scene_folder, out, "--random-init", "MODEL.WEIGHTS", str(weights))
    assert "give one of the two" in refused(both, capsys)
    missing = words(scene_folder, out, "MODEL.WEIGHTS", str(tmp_path / "none.pkl"))
    assert "no such file" in refused(missing, capsys)
    deeper = words(scene_folder, out, "MODEL.WEIGHTS", str(weights), "MODEL.RESNETS.DEPTH", "34")
    assert "add MODEL.RESNETS.DEPTH 18" in refused(deeper, capsys)
    with pytest.raises(UserError, match="a C4 config with a ResNet-18"):
        load_config("coco_R50_C4_2x", ["MODEL.RESNETS.DEPTH", "18"])
    assert not out.exists()


def test_a_file_that_lacks_one_tensor_stops_the_run(
    scene_folder: Path, weights: Path, tmp_path: Path, capsys: Any
) -> None:
    content = read_pickle(weights)
    model = {key: tensor.numpy() for key, tensor in content["model"].items()}
    del model["res4.0.conv1.norm.running_mean"]
    model["res4.9.conv1.weight"] = np.zeros(1, np.float32)
    weights_file.write_pickle(tmp_path / "lacking.pkl", model, content["origin"])
    argv = words(scene_folder, tmp_path / "o", "MODEL.WEIGHTS", str(tmp_path / "lacking.pkl"))
    said = refused(argv, capsys)
    assert "1 not in the file (backbone.bottom_up.res4.0.conv1.norm.running_mean)" in said
    assert "1 unknown to the model (res4.9.conv1.weight)" in said
    assert not (tmp_path / "o" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotation id 1 occurs more than once"),
        (
            lambda c: [a.update(bbox=[60, 0, 30, 10]) for a in c["annotations"]],
            "boxes reach outside their image",
        ),
        (lambda c: c["annotations"][0].update(category_id=99), "names category 99"),
        (lambda c: c["annotations"][0].update(image_id=99), "names image 99"),
        (lambda c: c["categories"].pop(), "names category 10|has 9 categories"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), "gone.jpg is missing"),
        (lambda c: c["images"][0].update(width=65), "its annotation says 65 x 64"),
        (lambda c: c.pop("images"), "not in COCO's format"),
    ],
)
def test_data_is_checked(scene_folder: Path, tmp_path: Path, harm: Any, said: str) -> None:
    content = json.loads((scene_folder / "train.json").read_text())
    harm(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    register([f"scenes_train={tmp_path / 'bad.json'}:{scene_folder / 'train'}"])
    register([f"scenes_test={scene_folder / 'test.json'}:{scene_folder / 'test'}"])
    cfg = load_config("scenes_R18_FPN", [])
    with pytest.raises(UserError, match=said):
        check(cfg)


def test_other_mistakes(scene_folder: Path, tmp_path: Path, capsys: Any) -> None:
    random = words(scene_folder, tmp_path / "o", "--random-init")
    assert "known names: " in refused(["--config-file", "nothing", *random[2:]], capsys)
    assert "NO.SUCH: detectron2's config has no such key" in refused([*random, "NO.SUCH", "1"], capsys)
    assert "did you mean SOLVER.MAX_ITER?" in refused([*random, "SOLVER.MAX_ITR", "1"], capsys)
    assert "SOLVER.MAX_ITER x: " in refused([*random, "SOLVER.MAX_ITER", "x"], capsys)
    assert "--num-gpus stands after KEY VALUE" in refused([*random, "--num-gpus", "0"], capsys)
    assert "pairs of KEY VALUE" in refused([*random, "SEED"], capsys)
    assert "leave out --eval-only" in refused(["--show", "x", "--eval-only", *random], capsys)
    polygons = refused([*random, "INPUT.MASK_FORMAT", "polygon"], capsys)
    assert "run-length encoded: add INPUT.MASK_FORMAT bitmask" in polygons
    assert "'elsewhere' is not known" in refused([*random, "DATASETS.TEST", "('elsewhere',)"], capsys)
    broken = [w.replace(".json:", ".xml:") for w in random]
    assert "wanted NAME=ANNOTATIONS.json:IMAGES" in refused(broken, capsys)
    if not torch.cuda.is_available():
        gpus = ["8" if random[i - 1] == "--num-gpus" else w for i, w in enumerate(random)]
        assert "this machine has 0" in refused(gpus, capsys)
    assert not (tmp_path / "o").exists()


# --- configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[a-z]*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads_and_its_header_names_what_it_is(path: Path) -> None:
    cfg = load_config(path, [], to_run_here=False)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"# Protocol: {cfg.PROTOCOL}" in head
    assert all(any(line.startswith(f"# {word}") for line in head)
               for word in ("Source:", "Command:", "Published score:"))  # fmt: skip
    frozen = path.stem.endswith("frozen") or "linear" in path.stem
    assert is_semantic(cfg) != cfg.TEST.PRECISE_BN.ENABLED and (cfg.MODEL.BACKBONE.FREEZE_AT == 5) == frozen
    assert frozen or cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert (cfg.MODEL.DEVICE == "cpu") == path.stem.startswith(("small", "scenes"))
    supervised = path.stem.endswith("supervised")
    assert (cfg.INPUT.FORMAT == "BGR") == cfg.MODEL.RESNETS.STRIDE_IN_1X1 == supervised
    if path.stem.startswith("sem_seg"):
        assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.SEM_SEG_HEAD.NORM == "SyncBN"
        assert re.search(r"# Source:   https://github.com/[^/]+/[^/]+/blob/[0-9a-f]{40}/", "\n".join(head))
    if path.stem.startswith(("coco", "voc")):
        norm = "naiveSyncBN" if "naive" in path.stem else "SyncBN"
        assert norm == cfg.MODEL.RESNETS.NORM and cfg.SOLVER.IMS_PER_BATCH == 16
        assert (cfg.SOLVER.BASE_LR, "vissl" in path.stem) in (
            (0.01 if "RetinaNet" in path.stem else 0.02, False), (0.1, True)
        )  # fmt: skip
        source = next(line for line in head if line.startswith("# Source:"))
        assert re.search(r"https://github.com/[^/]+/[^/]+/blob/[0-9a-f]{40}/", source)  # never a branch
        assert "differs" not in protocol_of(cfg, shipped(cfg.PROTOCOL))  # the three counterparts are compared


def test_c4_has_a_norm_after_res5_and_its_weights_load_with_that_norm_alone_missing(tmp_path: Path) -> None:
    from detectron2.modeling import build_model

    from transfer.detection.checkpointer import StrictCheckpointer

    torch.manual_seed(0)
    resnet = timm.create_model("resnet50", num_classes=0)
    weights = layout.to_detectron2(resnet.state_dict())
    weights_file.write_pickle(tmp_path / "r50.pkl", weights, {})
    model = build_model(load_config("small_R50_C4", []))
    assert isinstance(model.roi_heads.res5.norm, nn.BatchNorm2d)
    StrictCheckpointer(model).load(str(tmp_path / "r50.pkl"))
    loaded = model.roi_heads.res5[2].conv3.weight
    assert torch.equal(loaded, resnet.layer4[2].conv3.weight)
    assert [n for n, _ in model.roi_heads.res5.named_children()] == ["0", "1", "2", "norm"]


# --- where in the data a run is


def test_batches_are_a_function_of_their_number() -> None:
    wide = [i % 3 == 0 for i in range(10)]
    arguments: dict[str, Any] = {"seed": 1, "rank": 0, "world_size": 1, "batch_per_rank": 3, "by_shape": True}
    stream = index_batches(wide, **arguments)
    first = [next(stream) for _ in range(12)]
    for batch in first:
        assert len({wide[index] for _, index in batch}) == 1  # one shape a batch
    seen = sorted(position for batch in first for position, _ in batch)
    assert seen == sorted(set(seen))
    indices = [index for _, index in sorted(pair for batch in first for pair in batch)][:10]
    assert len(set(indices)) >= 9  # an epoch is a permutation; a bucket may still hold one of it

    def of(rank: int) -> list[int]:
        one = {**arguments, "rank": rank, "world_size": 2, "by_shape": False}
        batches = index_batches(wide, **one)
        return [position for _ in range(4) for position, _ in next(batches)]

    assert sorted(of(0) + of(1)) == list(range(24))


# --- several processes


def _inside_a_job(argv: list[str]) -> None:
    norm = nn.BatchNorm2d(1)  # rank 0: mean 0, variance 1; rank 1: mean 4, variance 3
    norm.running_mean.fill_(4.0 * rank())
    norm.running_var.fill_(1.0 + 2.0 * rank())
    precise_bn.average_statistics(norm)
    # Together: mean 2; mean square ((1 + 0) + (3 + 16)) / 2 = 10, less 2² = 6
    assert norm.running_mean.item() == 2 and norm.running_var.item() == 6
    assert run(train_net.main, argv) == 0
    assert is_on()  # the group of the job is left in place


def test_inside_a_jobs_process_group_with_synchronised_norm(
    scene_folder: Path, weights: Path, tmp_path: Path
) -> None:
    argv = words(
        scene_folder, tmp_path / "o", "MODEL.WEIGHTS", str(weights), "MODEL.RESNETS.NORM", "SyncBN",
        "SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.NUM_ITER", "1",
    )  # fmt: skip
    run_on_ranks(2, _inside_a_job, argv)
    lines = read_jsonl(tmp_path / "o" / "results.jsonl")
    assert [line["task"] for line in lines] == ["detection", "segmentation"]  # one rank writes
    assert lines[0]["settings"]["norms"]["RESNETS"] == "naiveSyncBN"  # torch's refuses CPU tensors
    assert lines[0]["settings"]["world_size"] == 2 and lines[0]["n"] == 3


# --- VOC


def write_voc(root: Path, scene_folder: Path) -> None:
    """The scenes in PASCAL VOC's layout, garments under VOC's first ten names."""
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    for year, split, source in (("2007", "trainval", "train"), ("2012", "trainval", "train"),
                                ("2007", "test", "test")):  # fmt: skip
        folder = root / f"VOC{year}"
        for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        content = json.loads((scene_folder / f"{source}.json").read_text())
        names = []
        for image in content["images"]:
            names.append(f"{source}{image['id']:06d}")
            data = (scene_folder / source / image["file_name"]).read_bytes()
            (folder / "JPEGImages" / f"{names[-1]}.jpg").write_bytes(data)
            tree = ET.Element("annotation")
            size = ET.SubElement(tree, "size")
            for key in ("width", "height"):
                ET.SubElement(size, key).text = str(image[key])
            for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = a["bbox"]
                thing = ET.SubElement(tree, "object")
                ET.SubElement(thing, "name").text = CLASS_NAMES[
                    a["category_id"] - 1
                ]  # no more than is needed
                box = ET.SubElement(thing, "bndbox")
                for key, number in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
                    ET.SubElement(box, key).text = str(int(number))
            ET.ElementTree(tree).write(folder / "Annotations" / f"{names[-1]}.xml")
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))


@pytest.fixture
def voc_folder(scene_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """VOC as detectron2 registers it when it is imported with DETECTRON2_DATASETS set to this folder."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.builtin import register_all_pascal_voc

    def register_in(root: Path) -> None:
        for name in [n for n in DatasetCatalog.list() if n.startswith("voc_20")]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_all_pascal_voc(str(root))

    write_voc(tmp_path / "datasets", scene_folder)
    register_in(tmp_path / "datasets")
    yield tmp_path / "datasets"
    register_in(Path(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def test_voc_by_its_registered_names(
    scene_folder: Path, weights: Path, voc_folder: Path, tmp_path: Path
) -> None:
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    argv = words(
        scene_folder, tmp_path / "o", "MODEL.WEIGHTS", str(weights), "MODEL.MASK_ON", "False",
        "MODEL.ROI_HEADS.NUM_CLASSES", "20", "DATASETS.TRAIN", "('voc_2007_trainval','voc_2012_trainval')",
        "DATASETS.TEST", "('voc_2007_test',)", "SOLVER.MAX_ITER", "2",
    )  # fmt: skip
    assert run(train_net.main, argv) == 0
    (line,) = read_jsonl(tmp_path / "o" / "results.jsonl")
    assert line["task"] == "detection" and line["metrics"].keys() == {"AP", "AP50", "AP75"}
    assert line["settings"]["AP_by_category"].keys() == set(CLASS_NAMES)
    assert "voc_2007_trainval of 9 images instead of 5011" in line["protocol"]["differs"]
    assert "voc_2007_test of 3 images instead of 4952" in line["protocol"]["differs"]
    assert (line["dataset"], line["split"], line["n"]) == ("voc_2007", "test", 3)


def test_a_missing_voc_folder_is_named(tmp_path: Path) -> None:
    cfg = load_config("voc_R50_C4_24k", [])
    with pytest.raises(UserError, match=r"trainval.txt is missing; set DETECTRON2_DATASETS"):
        check(cfg)


def test_signals_are_those_of_the_project() -> None:
    assert {s.name for s in StopSignals.SIGNALS} == {"SIGTERM", "SIGUSR2"}
