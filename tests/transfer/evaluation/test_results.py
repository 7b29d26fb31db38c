"""Results: a line written is the line read, the same evaluation is found again, figures are percentages."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.common.errors import UserError
from tests.helpers import checkpoint_zoo as zoo
from transfer.__main__ import main
from transfer.evaluation.context import backbone_of
from transfer.evaluation.results import FILE, Clock, Result, append, find, read
from transfer.evaluation.transforms import EvalTransform, ImageValues, eval_transform
from transfer.options.commands import parse

UNDER = {
    "image_size": 32, "resize": None, "fit": "whole", "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2], "precision": "float32", "n": 160, "n_train": 640,
}  # fmt: skip
RESULT = Result(
    task="knn", dataset="cifar10", split="test", n=160, metrics={"top1_k20": 40.0},
    protocol={"name": "solo_knn", "version": 1, "hash": "0"}, image_size=32, label="mine",
    weights={"path": "a.pt", "sha256": "ab", "format": "timm", "branch": "online"}, evaluated_under=UNDER,
    **Clock().stamp(torch.device("cpu")),
)  # fmt: skip


def test_a_line_comes_back(tmp_path: Path) -> None:
    append(tmp_path, RESULT)
    append(tmp_path, dataclasses.replace(RESULT, seed=3))
    with open(tmp_path / FILE, "a") as file:
        file.write('{"task": "knn", "torn')
    assert read(tmp_path) == [RESULT, dataclasses.replace(RESULT, seed=3)]
    assert RESULT.versions["torch"] and RESULT.started_at.endswith("+00:00") and "CPU" in RESULT.device


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"label_percent": 10}, {"split": "test (part)"},
        {"protocol": RESULT.protocol | {"hash": "1"}}, {"weights": RESULT.weights | {"branch": "ema"}},
        {"arch": "resnet50"},
        *({"evaluated_under": UNDER | {key: "other"}} for key in UNDER),
        {"evaluated_under": UNDER | {"world_size": 2}}, {"evaluated_under": {}},
    ],
    ids=str,
)  # fmt: skip
def test_another_evaluation_is_not_taken_for_this_one(tmp_path: Path, change) -> None:
    append(tmp_path, RESULT)
    like = dataclasses.replace(RESULT, metrics={}, device="other", label="renamed", seconds=3.0)
    assert find(tmp_path, like)
    assert not find(tmp_path, dataclasses.replace(RESULT, **change))


def test_the_conditions_have_a_hash_that_follows_them(tmp_path: Path) -> None:
    # of {"image_size": 32, "precision": "float32"}, by `printf ... | sha256sum`
    under = {"precision": "float32", "image_size": 32}
    assert dataclasses.replace(RESULT, evaluated_under=under).evaluated_under_hash == "45bcf4427e8e"
    append(tmp_path, dataclasses.replace(RESULT, evaluated_under=under))
    line = (tmp_path / FILE).read_text()
    assert '"evaluated_under_hash": "45bcf4427e8e"' in line
    (tmp_path / FILE).write_text(line.replace('"float32"', '"bfloat16"'))  # the hash is of what stands there
    (changed,) = read(tmp_path)
    assert changed.evaluated_under_hash not in ("45bcf4427e8e", "")
    assert dataclasses.replace(RESULT, evaluated_under={}).evaluated_under_hash == ""


def test_auto_takes_any_precision_and_a_named_one_itself_alone(tmp_path: Path) -> None:
    append(tmp_path, dataclasses.replace(RESULT, evaluated_under=UNDER | {"precision": "bfloat16"}))
    found = {
        p: len(find(tmp_path, dataclasses.replace(RESULT, evaluated_under=UNDER | {"precision": p})))
        for p in ("auto", "bfloat16", "float32")
    }
    assert found == {"auto": 1, "bfloat16": 1, "float32": 0}


def test_a_command_evaluates_anew_in_another_precision_or_architecture(
    few_images: Path, tmp_path: Path
) -> None:
    torch.save(zoo.backbone(), tmp_path / "m.pth")
    words = ["knn", "--weights", str(tmp_path / "m.pth"), "--protocol", "solo_knn@1", "--dataset", "cifar10"]
    words += ["--data-dir", str(few_images), "--output", str(tmp_path)]
    for more in (["--precision", "float32"], ["--precision", "bfloat16"], [], ["--arch", "resnetblur18"]):
        assert main([*words, *more]) == 0
    found = [(r.arch, r.settings["precision"]) for r in read(tmp_path)]
    assert found[:2] == [("resnet18", "float32"), ("resnet18", "bfloat16")]
    assert [arch for arch, _ in found[2:]] == ["resnetblur18"]  # auto was finished with either


def test_the_lines_of_an_evaluation_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    monkeypatch.setattr("os.fsync", syncs.append)
    append(tmp_path, RESULT, dataclasses.replace(RESULT, selection="best"))
    assert [r.selection for r in read(tmp_path)] == ["last", "best"] and len(syncs) == 1


@pytest.mark.parametrize("value", [float("nan"), 100.1, float("inf")])
def test_no_percentage_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no percentage"):
        dataclasses.replace(RESULT, metrics={"top1": value})


def test_a_line_says_on_how_many_ranks_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer.evaluation import context

    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return 160

    evaluation = context.Evaluation(
        task="linear", settings=SimpleNamespace(label=None), precision="float32", values=ImageValues(),
        protocol=SimpleNamespace(reference=RESULT.protocol, has_authors=False), seed=0,
        train=Images(notes=(), native_size=32),
        backbone=SimpleNamespace(weights=RESULT.weights, arch="resnet18", model=None),
        test=Images(name="d", split="test", notes=()), clock=SimpleNamespace(stamp=lambda _: {}),
        transform=EvalTransform(size=32, mean=(0.5,) * 3, std=(0.2,) * 3),
    )  # fmt: skip
    one = evaluation.result({"top1": 40.0}, torch.device("cpu"), settings={"batch": 8})
    assert one.settings == {"batch": 8, "world_size": 1, "precision": "float32"} and one.n == 160
    assert one.weights == RESULT.weights | {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert one.evaluated_under == UNDER | {"n_train": 160}
    monkeypatch.setattr(context, "world_size", lambda: 4)
    four = evaluation.result({"top1": 40.0}, torch.device("cuda", 0))
    assert four.settings == {"world_size": 4, "gpus": 4, "precision": "float32"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [  # another project's with a CIFAR stem; this project's, which says its own; with ImageNet's stem
        ("INTL", [0.4914, 0.4822, 0.4465, 0.2470, 0.2435, 0.2616]),
        ("this project, training run", [0.1, 0.2, 0.3, 1.0, 1.0, 1.0]),
        ("solo-learn", [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]),
    ],
)
def test_images_are_normalised_as_the_weights_want_or_as_told(name: str, wanted, tmp_path: Path) -> None:
    state = zoo.backbone(cifar=name != "solo-learn")
    torch.save(zoo.ZOO[name][0](state, {}), tmp_path / "m.pth")

    def used(*words: str) -> list[float]:
        given = ["--weights", str(tmp_path / "m.pth"), "--protocol", "solo_knn@1", "--dataset", "cifar10"]
        settings = parse("knn", [*given, "--data-dir", str(tmp_path), "--output", "o", *words])
        metadata = backbone_of(settings).metadata
        found = eval_transform(native_size=32, image_size=None, metadata=metadata)
        return [*found.mean, *found.std]

    assert used() == wanted
    assert used("--mean", "[0.5, 0.6, 0.7]") == [0.5, 0.6, 0.7, *wanted[3:]]
    assert used("--std=[1, 2, 3]") == [*wanted[:3], 1, 2, 3]
    for wrong in ("--mean=[0.5]", "--std=[1, 2, 0]", "--mean=[.nan, 1, 1]"):
        with pytest.raises(UserError, match="wanted three numbers"):
            used(wrong)


@pytest.mark.parametrize(
    "options", [["--image-size", "24"], ["--mean", "[0.1, 0.2, 0.3]"], ["--std", "[1, 1, 1]"]]
)
def test_each_condition_asked_for_is_a_result_of_its_own(options, few_images: Path, tmp_path: Path) -> None:
    words = ["knn", "--weights", "raw-pixels", "--protocol", "solo_knn@1", "--dataset", "cifar10"]
    words += ["--data-dir", str(few_images), "--output", str(tmp_path)]
    for more in ([], options, [], options):
        assert main([*words, *more]) == 0
    first, second = read(tmp_path)
    assert first.evaluated_under_hash != second.evaluated_under_hash


def test_what_is_not_the_protocols_own_stands_in_the_result(
    few_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(zoo.backbone(), tmp_path / "m.pth")
    words = [
        "knn",
        "--weights",
        str(tmp_path / "m.pth"),
        "--dataset",
        "cifar10",
        "--data-dir",
        str(few_images),
    ]
    asked = [
        ("solo_knn@2", []), ("solo_knn@2", ["--precision", "bfloat16"]), ("dino_knn@2", []),
        ("intl_cifar_5nn@2", ["--image-size", "24", "--std", "[1, 1, 1]"]),
    ]  # fmt: skip
    for protocol, more in asked:
        assert main([*words, "--protocol", protocol, *more, "--output", str(tmp_path / "o")]) == 0
    plain, half, whole, other = read(tmp_path / "o")
    assert plain.evaluated_under["precision"] == "float32" and plain.deviations == []
    assert half.evaluated_under["precision"] == half.settings["precision"] == "bfloat16"
    assert half.deviations == ["precision bfloat16; the protocol's is float32"]
    assert whole.deviations == [
        "small images whole, at 32 px; the protocol resizes to 256 px and crops 224 px"
    ]
    assert other.deviations == [
        "images of 24 px; the protocol's are of 32 px",
        "another mean and standard deviation of images than the protocol's",
    ]
    assert all(text in caplog.text for r in (half, whole, other) for text in r.deviations)


def test_a_backbone_that_was_never_trained_wants_a_word(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.network.model import build_backbone

    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "new.pth")
    words = ["--weights", str(tmp_path / "new.pth"), "--dataset", "cifar10", "--data-dir", str(few_images)]
    for task, protocol in (("knn", "solo_knn@2"), ("linear", "cached_linear@1"), ("semisup", "finetune@1")):
        more = ["--label-percent", "10"] if task == "semisup" else []
        assert main([task, *words, "--protocol", protocol, *more, "--output", str(tmp_path / task)]) == 2
        assert re.search(r"new.pth: never trained: .* --random-init true", capsys.readouterr().err)
    words += ["--protocol", "solo_knn@2", "--random-init", "true", "--output", str(tmp_path / "knn")]
    assert main(["knn", *words]) == 0 and len(read(tmp_path / "knn")) == 1


def test_what_costs_nothing_is_checked_before_the_images_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the images is missing, which is told last."""
    torch.save(zoo.backbone(), tmp_path / "w.pth")
    right = {"weights": str(tmp_path / "w.pth"), "arch": "resnet18", "precision": "float32"}
    right |= {"dataset": "imagefolder", "data_dir": str(tmp_path / "void"), "output": str(tmp_path / "out")}
    protocols = {"knn": "solo_knn@2", "linear": "cached_linear@1", "semisup": "finetune@1"}
    for task, protocol in protocols.items():
        wrong = (
            ({"weights": "no.pth"}, "no.pth"), ({"arch": "resnet50"}, "is a resnet18, not a resnet50"),
            ({"precision": "float8"}, "--precision"), ({"protocol": "nope@1"}, "nope@1"),
            ({"prefix": "a."}, "--prefix a."),
            ({"weights": "raw-pixels"}, "raw-pixels cannot" if task == "semisup" else "--arch resnet18"),
        )  # fmt: skip
        for changes, said in (*wrong, ({}, "void")):
            options = right | {"protocol": protocol} | changes
            words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", v)]
            share = ["--label-percent", "10"] if task == "semisup" else []
            assert main([task, *words, *share]) == 2
            err = capsys.readouterr().err
            assert said in err and ("void" in err) == (said == "void"), (task, changes, err)
    assert not (tmp_path / "out").exists()


def test_folders_of_images_are_told_apart_by_what_is_in_them(few_images: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(few_images, fewer)
    for split in ("train", "test"):
        shutil.rmtree(sorted((fewer / split).iterdir())[0])
    splits = []
    for i, folder in enumerate((few_images, fewer)):
        words = ["knn", "--weights", "raw-pixels", "--protocol", "solo_knn@1", "--dataset", "imagefolder"]
        assert main([*words, "--data-dir", str(folder), "--output", str(tmp_path / str(i))]) == 0
        splits += [r.split for r in read(tmp_path / str(i))]
    assert [s.partition(", ")[0] for s in splits] == ["test (10 classes", "test (9 classes"]
    assert splits[0].rpartition(" ")[2] != splits[1].rpartition(" ")[2]
