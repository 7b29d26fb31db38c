"""`reproduce`: published figures beside results of the same protocol, by hand and with a tiny checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.helpers.checkpoint_zoo import ZOO as written
from transfer.__main__ import main
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Result
from transfer.reproduce import Outcome, judge
from transfer.zoo.figures import Published, read_figure

FIGURE = {"method": "M", "pretraining": "p", "dataset": "imagenet", "source": "https://example.org/paper"}


def figure(task: str, protocol: str, **more: Any) -> Published:
    return read_figure({**FIGURE, "task": task, "protocol": protocol, **more})


def result(task: Any, by: str, **more: Any) -> Result:
    base = Result(
        task=task, dataset="imagenet", split="test", n=50_000, metrics={},
        protocol=load_protocol(by).reference, weights={"path": "zoo:m", "sha256": "a" * 64},
    )  # fmt: skip
    return dataclasses.replace(base, **more)


KNN = figure("knn", "dino_knn@2", metrics={"top1_k20": 67.5})


@pytest.mark.parametrize(
    ("ours", "verdict", "why"),
    [
        (67.5, "reproduced", "+0.00, tolerance 0.2"),
        (
            67.7,
            "reproduced",
            "+0.20, tolerance 0.2",
        ),  # at its edge
        (67.3, "reproduced", "-0.20, tolerance 0.2"),
        (67.0, "outside tolerance", "-0.50, tolerance 0.2: outside by 0.30"),
        (69.5, "outside tolerance", "+2.00, tolerance 0.2: outside by 1.80"),
    ],
)
def test_within_and_outside_tolerance(ours: float, verdict: str, why: str) -> None:
    (found,) = judge(KNN, [result("knn", "dino_knn@2", metrics={"top1_k10": 1.0, "top1_k20": ours})])
    assert (found.verdict, found.why, found.ours) == (verdict, why, ours)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n": 49_999}, "of 50,000 images of imagenet, ours of 49,999"),
        ({"split": "test (49,000 of 50,000 images)"}, r"ours of 50,000 of imagenet test \(49,000"),
        ({"dataset": "imagenet100"}, "ours of 50,000 of imagenet100"),
        ({"deviations": ["images of 96 px"]}, "ours was not by dino_knn@2 as it is: images of 96 px"),
        ({"protocol": {"name": "dino_knn", "version": 2, "hash": "0" * 12}}, "other values than the shipped"),
        ({"protocol": load_protocol("solo_knn@2").reference}, "it is by dino_knn@2, ours by solo_knn@2"),
        ({"metrics": {"top1_k10": 67.5}}, "ours has top1_k10 alone"),
    ],
)
def test_what_is_not_comparable_says_why(changes: dict, why: str) -> None:
    (found,) = judge(KNN, [result("knn", "dino_knn@2", **{"metrics": {"top1_k20": 67.5}, **changes})])
    assert found.verdict == "not comparable"
    assert re.search(why, found.why), found.why


def test_the_epoch_is_chosen_as_the_source_chose_it() -> None:
    linear = figure("linear", "intl_linear@2", metrics={"top1": 73.5, "top5": 91.0}, selection="best")
    last = result("linear", "intl_linear@2", metrics={"top1": 73.5, "top5": 91.0}, selection="last")
    best = dataclasses.replace(last, metrics={"top1": 73.9, "top5": 91.0}, selection="best")
    assert [o.verdict for o in judge(linear, [last, best])] == ["outside tolerance", "reproduced"]
    assert {o.why for o in judge(linear, [last])} == {"it is of the epoch chosen as best, ours has last"}
    # the source does not say: the last epoch, as in the report's headline
    unsaid = dataclasses.replace(linear, selection="")
    assert [o.verdict for o in judge(unsaid, [best, last])] == ["reproduced", "reproduced"]


def test_tolerances() -> None:
    spread = figure("linear", "moco_linear@2", metrics={"top1": 60.8}, spread={"top1": 0.2})
    own = dataclasses.replace(spread, tolerance={"top1": 0.05})
    plain = dataclasses.replace(spread, spread={})
    # 0.3 for a linear probe; twice the source's standard deviation where that is more; the figure's own
    assert [f.within("top1") for f in (plain, spread, own)] == [0.3, 0.4, 0.05]


def test_nothing_to_reproduce_is_told_before_anything_is_fetched(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("INTL_BENCH_DATA", str(tmp_path / "cache"))
    words = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    for more, said in (
        (["ibot_vits16"], "none is known"),
        (
            ["resa_resnet50_ep100_bs256"],
            "knn: no protocol here repeats what its source did (",
        ),
        (["dino_resnet50", "--dataset", "cifar10"], "linear: it is of imagenet: --dataset imagenet"),
        (["dino_resnet51"], "did you mean dino_resnet50"),
        (["dino_resnet50", "--batch-size", "0"], "--batch-size 0: wanted 1 to 1,048,576"),
        (["dino_resnet50", "--workers", "1000000"], "--workers 1000000: wanted 0 to 1,024"),
        (["dino_resnet50", "--seed", "-1"], "--seed -1: wanted 0 to 4,294,967,295"),
    ):
        assert main(["reproduce", *more, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------ with a checkpoint of two tiny networks


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black, grey and white images, 8 to train on and 4 to test of each, told apart by one pixel."""
    root = tmp_path_factory.mktemp("greys")
    for level in (0, 128, 255):
        for i in range(12):
            image = Image.new("RGB", (32, 32), (level, level, level))
            image.putpixel((i, i), (100, 100, 100))
            folder = root / ("train" if i < 8 else "val") / f"level{level}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MoCo's files of a network that sees, and one that sees nothing: all its features are alike."""
    torch.manual_seed(0)
    sees = dict(timm.create_model("resnet18", num_classes=0).state_dict())
    sees |= {k: v + 1 for k, v in sees.items() if k.endswith("num_batches_tracked")}
    blind = sees | {"conv1.weight": torch.zeros_like(sees["conv1.weight"])}
    build, folder = written["MoCo v1, v2; PCL"][0], tmp_path_factory.mktemp("networks")
    for name, both in (("right", (blind, sees)), ("swapped", (sees, blind))):
        torch.save(build(*both), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in ("right", "swapped")}


PROTOCOL = {
    "task": "knn", "title": "k-NN of a test", "source": "this test",
    "values": {
        "ks": [1], "temperature": 0.07, "vote": "majority", "metric": "euclidean", "resize": 32, "crop": 32,
        "precision": "float32",
    },
}  # fmt: skip
SOURCE = "https://example.org/paper"


def test_a_checkpoint_is_reproduced_or_not(
    greys: Path, networks: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("INTL_BENCH_DATA", str(tmp_path / "cache"))
    (tmp_path / "my_knn@1.yaml").write_text(yaml.safe_dump(PROTOCOL))

    def run(value: float, file: Path, output: str, **more: Any) -> list[Outcome]:
        row = {"task": "knn", "dataset": "imagefolder", "n": 12}
        ours = {**row, "protocol": "my_knn@1.yaml", "metrics": {"top1_k1": value}, **more}
        figures = [ours, {**row, "metrics": {"top1": 50.0}, "note": "theirs"}]
        entry = {"url": file.as_uri(), "source": SOURCE, "branch": "ema", "figures": figures}
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump({"checkpoints": {"tiny": entry}}))
        words = ["tiny", "--zoo", str(tmp_path / "zoo.yaml"), "--dataset", "imagefolder", "--workers", "0"]
        assert main(["reproduce", *words, "--data-dir", str(greys), "--output", str(tmp_path / output)]) == 0
        return [Outcome(**o) for o in json.loads((tmp_path / output / "reproduction.json").read_text())]

    first, theirs = run(99.0, networks["right"], "a")
    # another folder of images than the test images as a whole, which is all that the figure says
    assert first.verdict == "not comparable" and "ours of 12 of imagefolder test (" in first.why
    assert theirs.why == "no protocol here repeats what its source did (theirs)"
    lines = (tmp_path / "a" / "knn-my_knn-v1" / "results.jsonl").read_text().splitlines()
    line = json.loads(lines[0])
    assert (len(lines), line["weights"]["branch"], line["label"]) == (1, "ema", "tiny")
    assert line["metrics"]["top1_k1"] == 100.0
    images = {"split": line["split"]}

    found = run(100.0, networks["right"], "a", **images)[0]
    assert (found.verdict, found.why) == ("reproduced", "+0.00, tolerance 0.2")
    assert "finished already" in capsys.readouterr().out  # nothing is computed anew
    outside = run(97.0, networks["right"], "a", **images, tolerance={"top1_k1": 1})[0]
    assert (outside.verdict, outside.why) == ("outside tolerance", "+3.00, tolerance 1: outside by 2.00")
    capsys.readouterr()

    swapped = run(100.0, networks["swapped"], "b", **images)[0]
    # every query is equally near to every image, so all get the class of the first one: one in three is right
    assert (swapped.verdict, swapped.ours) == ("outside tolerance", 33.3333)
    assert "1 outside tolerance, 1 not comparable" in capsys.readouterr().out
