"""Training runs on real images: whole, resumed to the bit, stopped, refused, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.checkpoint import load_checkpoint
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import read_jsonl
from pretrain.common.machine import computes_bfloat16
from pretrain.common.signals import Stopped
from pretrain.data.corrupt_images import CorruptImages
from pretrain.plan import Plan
from pretrain.settings import Settings
from pretrain.train import train
from tests.helpers.ranks import start_ranks, wait_ranks
from tests.helpers.tiny_resnet import ARCH
from tests.helpers.training import CPU, differing, stop_after_epoch_one, tiny, weights


@pytest.fixture(scope="module")
def finished(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(cifar_folder, output, keep_every_epochs=1), CPU)
    return output


def test_a_run_leaves_what_the_next_steps_read(finished: Path) -> None:
    state = load_checkpoint(finished / "checkpoint.pt")
    assert state["step"] == 8 and state["epoch"] == 2 and state["config"]["arch"] == ARCH
    assert {k.split(".")[0] for k in state["model"]} == {"backbone", "projector"} and state["ema"] is None
    assert load_checkpoint(finished / "checkpoint_epoch1.pt")["step"] == 4
    backbone = load_file(finished / "backbone.safetensors")
    timm.create_model(ARCH, num_classes=0).load_state_dict(backbone, strict=True)
    assert all(torch.equal(v, state["model"][f"backbone.{k}"]) for k, v in backbone.items())
    records = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4, 6, 8] and records[-1]["epoch"] == 2
    wanted = {
        "loss",
        "alignment",
        "trace",
        "loss_minus_floor",
        "lr",
        "images_per_s",
        "condition_number",
        "rankme",
    }
    assert wanted <= records[0].keys()
    for r in records:
        assert r["loss"] == pytest.approx(r["alignment"] + 0.01 * (np.log2(160) - 3) * r["trace"], rel=1e-4)
        assert r["loss_minus_floor"] > 0
    assert list((finished / "tensorboard").iterdir()) and (finished / "progress.json").exists()
    assert not list(finished.glob(".*"))


def test_weights_and_biases_goes_on_with_a_resumed_run_and_begins_another_for_a_new_one(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    seen: list[tuple[str, float]] = []

    def look(*_: object) -> dict[str, float]:
        seen.append((wandb.run.id, wandb.run.summary["loss"]))
        if len(seen) == 1:
            stop_after_epoch_one()
        return {}

    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "run"
    settings = tiny(cifar_folder, output, wandb="intl", hook_every_epochs=1)
    with pytest.raises(Stopped):
        train(settings, CPU, hook=look)
    assert wandb.run is None, "a run that was stopped is finished"
    train(settings, CPU, hook=look)
    losses = {r["step"]: r["loss"] for r in read_jsonl(output / "metrics.jsonl") if "loss" in r}
    ours = (output / "wandb_id").read_text().strip()
    assert seen == [(ours, losses[2]), (ours, losses[6])], "W&B takes a step in when it is given the next"
    assert len(list((output / "wandb").glob(f"offline-run-*-{ours}/run-{ours}.wandb"))) == 2
    (output / "checkpoint.pt").unlink()
    train(tiny(cifar_folder, output, wandb="intl", epochs=1), CPU)
    assert (output / "wandb_id").read_text().strip() != ours


def test_hard_whitening_trains_in_place_of_intl(cifar_folder: Path, tmp_path: Path) -> None:
    train(tiny(cifar_folder, tmp_path / "run", power=0.5, epochs=1), CPU)
    line = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["loss"] == line["alignment"] == line["loss_minus_floor"] and line["trace"] == 0
    with safe_open(tmp_path / "run" / "backbone.safetensors", "pt") as file:
        assert file.metadata()["source"] == "λ^-0.5 pretraining"


def test_the_loss_falls_on_real_images(cifar_folder: Path, tmp_path: Path) -> None:
    """The control takes the same twelve batches at a learning rate of 0. Were the network no better for its
    training, six of its steps would lie below all twelve of the control's once in C(18, 6) = 18,564 runs."""
    above_floor = {}
    for lr in (0.2, 0.0):
        output = tmp_path / str(lr)
        train(tiny(cifar_folder, output, epochs=3, log_every=1, warmup_epochs=0, lr=lr), CPU)
        above_floor[lr] = [r["loss_minus_floor"] for r in read_jsonl(output / "metrics.jsonl")]
    assert len(above_floor[0.2]) == len(above_floor[0.0]) == 12
    assert above_floor[0.2][0] == above_floor[0.0][0]
    assert max(above_floor[0.2][6:]) < min(above_floor[0.0])


def test_a_finished_run_is_left_alone(
    finished: Path, cifar_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (finished / "checkpoint.pt").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train(tiny(cifar_folder, finished, keep_every_epochs=1), CPU)
    assert "inside the warm-up" not in caplog.text
    assert "is finished" in caplog.text and (finished / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": True, "view_sizes": [16, 12, 12], "blur_p": [0.5], "solarise_p": [0.1], "whitening": "batch"},
        pytest.param(
            {"precision": "bfloat16", "view_sizes": [12, 12]},
            marks=pytest.mark.skipif(
                not computes_bfloat16(CPU), reason="minutes without bfloat16 instructions"
            ),
        ),
    ],
    ids=["two views", "six-crop-like with EMA", "bfloat16"],
)
def test_stopped_and_continued_equals_uninterrupted_to_the_bit(
    changes: dict, cifar_folder: Path, finished: Path, tmp_path: Path
) -> None:
    whole = finished
    if changes:
        whole = tmp_path / "whole"
        train(tiny(cifar_folder, whole, **changes), CPU)
    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        train(tiny(cifar_folder, cut, hook_every_epochs=1, **changes), CPU, hook=stop_after_epoch_one)
    assert 4 <= load_checkpoint(cut / "checkpoint.pt")["step"] < 8
    assert not (cut / "backbone.safetensors").exists()
    train(tiny(cifar_folder, cut, workers=2, **changes), CPU)
    assert differing(whole, cut) == []
    logged = [r["step"] for r in read_jsonl(cut / "metrics.jsonl") if "loss" in r]
    assert logged == [2, 4, 6, 8]
    assert sum("momentum_buffer" in k for k in weights(whole)) > 40
    if changes.get("ema"):
        online, target = (load_file(cut / f) for f in ("backbone.safetensors", "backbone_ema.safetensors"))
        assert online.keys() == target.keys() and not torch.equal(
            online["conv1.weight"], target["conv1.weight"]
        )


def test_lines_of_a_continued_run_are_those_of_an_uninterrupted_one(
    cifar_folder: Path, tmp_path: Path
) -> None:
    """Neither the saves nor a stop between two lines takes steps out of the means of the next line."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny(cifar_folder, whole, log_every=3), CPU)
    saving = tiny(cifar_folder, cut, log_every=3, save_every=1, hook_every_epochs=1)
    with pytest.raises(Stopped):
        train(saving, CPU, hook=stop_after_epoch_one)
    assert load_checkpoint(cut / "checkpoint.pt")["step"] in (4, 5)
    train(saving, CPU)
    lines = [
        [
            {k: v for k, v in r.items() if k != "images_per_s"}
            for r in read_jsonl(run / "metrics.jsonl")
            if "loss" in r  # not the hook's
        ]
        for run in (whole, cut)
    ]
    assert [r["step"] for r in lines[0]] == [3, 6, 8] and lines[0] == lines[1]


def test_another_seed_gives_other_weights(
    finished: Path, cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The control of the comparison above: it can fail."""
    with caplog.at_level("INFO"):
        train(tiny(cifar_folder, tmp_path, seed=2, max_steps=1, workers=1), CPU)
    assert caplog.text.count("all 1 steps lie inside the warm-up (--warmup-epochs 0.25, 4 steps an") == 1
    assert "1 loader workers, colour and blur in the workers (--augment-on auto)" in caplog.text
    assert len(differing(finished, tmp_path)) > 40


def test_a_folder_of_another_run_is_refused(finished: Path, cifar_folder: Path) -> None:
    with pytest.raises(UserError, match=r"other settings \(lr: 0.2 there, 0.3 now\)"):
        train(tiny(cifar_folder, finished, lr=0.3), CPU)
    train(tiny(cifar_folder, finished, workers=1, log_every=50), CPU)  # these may differ


def test_control_has_the_runs_initialisation_and_estimated_statistics(
    cifar_folder: Path, tmp_path: Path
) -> None:
    from pretrain.data.datasets import open_dataset

    train(tiny(cifar_folder, tmp_path / "control", arch="resnet18", epochs=0, ema=True), CPU)
    control = load_file(tmp_path / "control" / "backbone.safetensors")
    target = load_file(tmp_path / "control" / "backbone_ema.safetensors")
    assert target.keys() == control.keys() and all(torch.equal(target[k], v) for k, v in control.items())
    torch.manual_seed(1)
    fresh = timm.create_model("resnet18", num_classes=0, zero_init_last=False)
    for name, value in fresh.named_parameters():
        assert torch.equal(value, control[name]), name
    fresh.load_state_dict(control)
    data = open_dataset("cifar10", cifar_folder, "train")
    pixels = np.stack(
        [np.asarray(data.image(i).resize((16, 16), Image.Resampling.BILINEAR)) for i in range(640)]
    )
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        maps = fresh.conv1(x)
    # Means over batches of 256 of the 640 images: near those of all, far from the initial 0 and 1.
    assert (maps.mean((0, 2, 3)) - control["bn1.running_mean"]).abs().max() < 0.1 * maps.std()
    assert torch.allclose(maps.var((0, 2, 3)), control["bn1.running_var"], rtol=0.15)
    assert read_jsonl(tmp_path / "control" / "metrics.jsonl") == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    cifar_folder: Path, tmp_path: Path
) -> None:
    settings = tiny(cifar_folder, tmp_path, lr=1e25, warmup_epochs=0, log_every=1, save_every=1)
    with pytest.raises(
        RunFailed, match=r"(loss is not finite at step \d+: total .* learning rate|weights are not)"
    ):
        train(settings, CPU)
    saved = tmp_path / "checkpoint.pt"
    assert not saved.exists() or all(torch.isfinite(v).all() for v in weights(tmp_path).values())


def test_broken_images_are_skipped_up_to_a_limit(
    cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(cifar_folder / "train", data / "train")
    broken = sorted((data / "train").rglob("*.jpg"))[5::100]
    for file in broken:
        file.write_bytes(file.read_bytes()[:200])
    train(tiny(data, tmp_path / "run", epochs=1), CPU)
    named = [f for f in broken if str(f) in caplog.text]
    assert len(named) >= len(broken) - 1 and caplog.text.count(" skipped: ") == len(named)
    with pytest.raises(
        RunFailed, match=r"more than --max-broken-images 2 images cannot be read; the last: .*\.jpg"
    ):
        train(tiny(data, tmp_path / "other", epochs=1, max_broken_images=2), CPU)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_at_all_is_one_clear_line(workers: int, cifar_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(cifar_folder / "train", data / "train")
    for file in (data / "train").rglob("*.jpg"):
        file.write_bytes(b"not an image")
    with pytest.raises(RunFailed, match=r"^100 images in a row cannot be read, the last: .*\.jpg: not a"):
        train(tiny(data, tmp_path / "run", epochs=1, workers=workers), CPU)


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_a_collapsed_embedding_raises_the_alarm(
    on_collapse: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that are all the same cannot be told apart."""
    (tmp_path / "train" / "one").mkdir(parents=True)
    for i in range(64):
        Image.new("RGB", (24, 24), (90, 120, 60)).save(tmp_path / "train" / "one" / f"{i}.png")
    settings = tiny(
        tmp_path, tmp_path / "run", dataset="imagefolder", batch_global=32, on_collapse=on_collapse,
        log_every=1, jitter_p=[0.0], grey_p=[0.0], solarise_p=[0.0], blur_p=[0.0], projector_layers=1,
    )  # fmt: skip
    if on_collapse == "stop":
        with pytest.raises(RunFailed, match=r"stopped: .*collapse"):
            train(settings, CPU)
    else:
        train(settings, CPU)
        assert "collapse" in caplog.text


def test_hook_sees_the_backbone_and_is_logged(finished: Path, cifar_folder: Path, tmp_path: Path) -> None:
    seen = []

    def hook(backbone: torch.nn.Module, settings: Settings) -> dict[str, float]:
        seen.append((backbone.training, tuple(backbone(torch.zeros(1, 3, 24, 24)).shape)))
        return {"knn_top1": 12.5}

    train(tiny(cifar_folder, tmp_path, hook_every_epochs=1), CPU, hook=hook)
    assert seen == [(False, (1, 64))] * 2
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "knn_top1" in r] == [4, 8]
    assert differing(finished, tmp_path) == []  # looking on changes nothing


def test_plan_by_hand() -> None:
    settings = tiny(Path("d"), Path("o"), warmup_epochs=0.5, lr=0.4)
    plan = Plan.of(settings, 640, 2)
    assert (plan.steps_per_epoch, plan.steps, plan.warmup, plan.batch_per_rank) == (4, 8, 2, 80)
    assert plan.lr == pytest.approx(0.4 * 160 / 256)
    assert Plan.of(tiny(Path("d"), Path("o"), max_steps=3), 640, 1).steps == 3
    with pytest.raises(UserError, match="more than the 100 images"):
        Plan.of(settings, 100, 1)
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        Plan.of(settings, 640, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"view_sizes": [24]}, "at least 2 views"),
        ({"view_sizes": [24, 4]}, "at least 8 px"),
        ({"grey_p": [0.1, 0.2, 0.3]}, "--grey-p has 3 values for 2 views"),
        ({"jitter_p": [1.5]}, "--jitter-p must lie between 0 and 1"),
        ({"min_scales": [0.9], "max_scales": [0.5]}, "at most its --max-scales"),
        ({"batch_global": 8}, "trade-off is zero or negative"),
        ({"jitter": [0.4, 0.4]}, "--jitter wants"),
        ({"blur_sigma": [2.0, 0.1]}, "--blur-sigma wants"),
        ({"std": [0.0, 1.0, 1.0]}, "--std want"),
        ({"power": 0.5, "iterations": 7, "trade_off": 1.0}, r"--iterations 7 and --trade-off 1.0 would do"),
        ({"epochs": -1}, "--epochs must be at least 0"),
        ({"keep_every_epochs": 0}, "--keep-every-epochs must be at least 1"),
        ({"trade_off": -1.0}, "--trade-off must be a number of at least 0"),
        ({"whitening": "batch", "projector_output": 8}, "negative at --projector-output 8"),
    ],
)
def test_settings_that_make_no_sense_are_explained(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny(Path("d"), Path("o"), **changes)


def test_a_power_has_no_trade_off_to_set() -> None:
    assert tiny(Path("d"), Path("o"), power=0.5, batch_global=8).trade_off is None


def test_float16_is_refused_on_a_cpu(cifar_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16 needs a GPU"):
        train(tiny(cifar_folder, tmp_path / "run", precision="float16"), CPU)
    assert not (tmp_path / "run").exists()


def test_two_ranks_step_as_one(cifar_folder: Path, tmp_path: Path) -> None:
    """One step: float32 rounding alone (another order of the batch) makes later ones differ by tenths."""
    train(tiny(cifar_folder, tmp_path / "one", max_steps=1), CPU)
    wait_ranks(start_ranks(tiny(cifar_folder, tmp_path / "two", max_steps=1)), 0)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in (k for k in one if one[k].is_floating_point()):
        error = (one[name] - two[name]).norm() / one[name].norm().clamp_min(1e-3)
        assert error < 0.01, (name, float(error))
    (alone,), (joined,) = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("rankme", "row_entropy_rank", "spread"):  # of the whole batch, not of a rank's share
        assert joined[key] == pytest.approx(alone[key], rel=1e-3), key


def test_two_ranks_make_the_control_of_one(cifar_folder: Path, tmp_path: Path) -> None:
    for name, world in (("one", 1), ("two", 2)):  # each with one thread: equal to the bit
        wait_ranks(start_ranks(tiny(cifar_folder, tmp_path / name, epochs=0), world=world), 0)
    assert differing(tmp_path / "one", tmp_path / "two") == []


def test_images_that_ranks_skip_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = CorruptImages(3, before=["a"])
    skipped.note(["a", "b"])
    monkeypatch.setattr("pretrain.data.corrupt_images.gather_objects", lambda own: [own, {"c"}])
    skipped.agree()
    assert skipped.images == {"a", "b", "c"}
    skipped.note(["d"][:0])
    skipped.agree()  # nothing is new: nothing is gathered
    with pytest.raises(RunFailed, match="more than --max-broken-images 3 images cannot be read"):
        skipped.note(["d", "e"])


def test_what_a_kill_cut_off_behind_a_checkpoint_is_caught_up(cifar_folder: Path, tmp_path: Path) -> None:
    """Killed between an epoch's checkpoint, its copy and the hook's line."""
    called: list[int] = []

    def hook(backbone: torch.nn.Module, settings: Settings) -> dict[str, float]:
        called.append(1)
        return {"knn_top1": 50.0}

    settings = tiny(cifar_folder, tmp_path, epochs=2, keep_every_epochs=1, hook_every_epochs=1)
    train(settings, CPU, hook=hook)
    kept = (tmp_path / "checkpoint_epoch1.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(kept)
    (tmp_path / "checkpoint_epoch1.pt").unlink()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    first = next(i for i, line in enumerate(lines) if "knn_top1" in line)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:first]))
    before = weights(tmp_path)
    called.clear()
    train(settings, CPU, hook=hook)
    assert len(called) == 2 and (tmp_path / "checkpoint_epoch1.pt").read_bytes() == kept
    strip = [
        {k: v for k, v in x.items() if k != "images_per_s"} for x in read_jsonl(tmp_path / "metrics.jsonl")
    ]
    assert strip == [{k: v for k, v in x.items() if k != "images_per_s"} for x in lines]
    assert before.keys() == weights(tmp_path).keys()


def test_two_ranks_resume_to_the_bit(few_images: Path, tmp_path: Path) -> None:
    """Two steps an epoch of 200 images, four in all; stopped in the middle."""
    wait_ranks(start_ranks(tiny(few_images, tmp_path / "whole", batch_global=80)), 0)
    cut = tiny(few_images, tmp_path / "cut", batch_global=80, hook_every_epochs=1)
    wait_ranks(
        start_ranks(cut, "--hook", f"{stop_after_epoch_one.__module__}:{stop_after_epoch_one.__name__}"), 75
    )
    assert 2 <= load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] < 4
    wait_ranks(start_ranks(cut, "--workers", "1"), 0)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
