"""`python -m transfer inspect FILE` as a user types it, and the table of formats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from tests.helpers import checkpoint_zoo as zoo
from transfer.__main__ import main
from transfer.checkpoints.safe_load import load_file

A, B = zoo.backbone(0), zoo.backbone(1)


def save(value: object, path: Path) -> str:
    torch.save(value, path)
    return str(path)


def test_a_complete_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save(zoo.ZOO["DINO"][0](A, B), tmp_path / "dino.pth")
    assert main(["inspect", path]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("format DINO", "resnet18, imagenet stem", "11,176,512 parameters, 512 features",
                  "online: complete", "ema: complete", "used 120 tensors of the online branch, each once",
                  f"sha256 {sha256_of(path)}", "argparse.Namespace", "--branch ema",
                  "complete: the backbone loads"):  # fmt: skip
        assert words in shown, words


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save(zoo.ZOO["MoCo v1, v2; PCL"][0](A, B), tmp_path / "moco.pth.tar")
    assert main(["inspect", path, "--json", "--branch", "ema"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["loads"] and said["branch"] == "ema" and said["arch"] == "resnet18"
    assert said["format"] == "MoCo v1, v2; PCL" and said["sha256"] == sha256_of(path)
    assert said["used"]["module.encoder_k.conv1.weight"] == "conv1.weight" and len(said["used"]) == 120
    assert said["dropped"]["module.queue"] == "queue"
    assert said["dropped"]["module.encoder_q.conv1.weight"] == "online branch"
    assert said["branches"] == {"online": "complete", "ema": "complete"}


def test_an_incomplete_file_shows_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    state = {k: v for k, v in A.items() if not k.startswith("layer3.1.")}
    path = save({"epoch": 7, "state_dict": zoo.pre("module.encoder_q.", state)}, tmp_path / "m.pth")
    assert main(["inspect", path]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "epoch: 7" in shown and "state_dict: 108 tensors: encoder_q (108)" in shown
    assert "Nearest known format: MoCo v1, v2; PCL, online branch, resnet18" in shown
    assert "missing: layer3.1.conv1.weight" in shown
    assert main(["inspect", path, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert not said["loads"] and "missing: layer3.1.conv1.weight" in said["problem"]
    assert main(["inspect", path, "--keys"]) == 2
    assert "\nstate_dict: module.encoder_q.conv1.weight (64, 3, 7, 7)\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no such file; did you mean m\.pth"):
        load_file(tmp_path / "mm.pth")


def test_group_norm_and_tensors_sharded_over_ranks_are_told_with_the_way_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import timm
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    def told(state: object, *words: str) -> str:
        assert main(["inspect", save(state, tmp_path / "w.pth"), *words]) == (0 if words else 2)
        return " ".join(capsys.readouterr().out.split())

    gn = timm.create_model("resnet50_gn", num_classes=0).state_dict()
    assert "`--arch resnet50_gn` works" in told({"state_dict": gn})
    assert "complete: the backbone loads" in told({"state_dict": gn}, "--arch", "resnet50_gn")
    bare = {k: v for k, v in A.items() if "running_" not in k and "batches" not in k}
    assert "no BatchNorm statistics: a GroupNorm ResNet" in (said := told(bare))
    assert "transfer.evaluate(module, ...)" in said
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        few = {k: v for k, v in A.items() if k.startswith(("conv1", "bn1", "layer1"))}
        sharded = {k: distribute_tensor(v.clone(), mesh) for k, v in few.items()}
        torch.save({"model": sharded}, tmp_path / "sharded.pth")
    finally:
        dist.destroy_process_group()
    assert main(["inspect", str(tmp_path / "sharded.pth")]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "sharded over ranks (DTensor): join them first" in said and "full_state_dict=True" in said


def test_a_file_with_the_ema_branch_alone_is_taken_as_that(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save({"teacher": zoo.pre("backbone.", B)}, tmp_path / "teacher.pth")
    assert main(["inspect", path, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["branch"] == "ema" and said["branches"]["online"] == "none"
    assert main(["inspect", path, "--branch", "online"]) == 2
    assert "take it with --branch ema" in " ".join(capsys.readouterr().out.split())


def test_keys_lists_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save(A | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "m.pth")
    assert main(["inspect", path, "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "layer1.0.conv1.weight -> layer1.0.conv1.weight" in lines and "fc.weight dropped: classifier" in lines
    )


def test_own_file_shows_its_metadata(tmp_path: Path, capsys: pytest.CaptureFixture):
    metadata = {
        "format": "intl-bench/1",
        "arch": "resnet18",
        "stem": "cifar",
        "branch": "online",
        "dataset": "x-1",
    }
    state = {k: v.clone() for k, v in zoo.backbone(cifar=True).items()}
    save_file(state, tmp_path / "b.safetensors", metadata)
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "dataset: x-1" in shown and "cifar stem, padding 2" in shown


def test_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture):
    value = {"\x1b[2Jcleared": "\x1b]0;title\x07", "state_dict": A | {"\x1b[31mred.weight": torch.zeros(1)}}
    assert main(["inspect", save(value, tmp_path / "m.pth")]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "left over: `?[31mred.` (1)" in said.out


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert main(["inspect", str(tmp_path / "page.pth")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "web page" in said and "Traceback" not in said
    save({"args": argparse.Namespace(a=1)}, tmp_path / "empty.pth")
    assert main(["inspect", str(tmp_path / "empty.pth")]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "holds no network of timm's: there are no tensors in it, only 'args'" in shown
