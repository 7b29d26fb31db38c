"""SVMs of VOC07: the measure by hand, the fit against scikit-learn, the command on composed scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from pretrain.common.errors import UserError
from pretrain.data.datasets import open_dataset
from pretrain.data.voc07 import CLASSES, open_voc07
from slurm.commands.suite import main as suite
from tests.helpers import checkpoint_zoo
from transfer.__main__ import main as transfer
from transfer.evaluation import results
from transfer.evaluation.protocol import load_protocol
from transfer.evaluators.linear import main as linear
from transfer.evaluators.linear_protocol import LinearProtocol
from transfer.evaluators.svm import average_precision, check_shots, fit_class, fit_class_low_shot, unit_length


def test_average_precision_by_hand() -> None:
    # Ranked by score: 0 1 1 0 1. Precision at the positives: 1/2, 2/3, 3/5; the highest at that or a later
    # rank: 2/3, 2/3, 3/5. Mean: (2/3 + 2/3 + 3/5) / 3.
    targets = np.array([0, 1, 1, 0, 1])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert average_precision(targets, scores) == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    shuffled = np.array([3, 0, 4, 2, 1])
    assert average_precision(targets[shuffled], scores[shuffled]) == average_precision(targets, scores)
    # a difficult image (-1) with the highest score of all is as if it were not there
    assert average_precision(np.append(targets, -1), np.append(scores, 9.0)) == pytest.approx(
        (2 / 3 + 2 / 3 + 3 / 5) / 3
    )


def test_average_precision_at_its_ends_and_above_the_uninterpolated() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random(200) < 0.2).astype(int)
    assert average_precision(targets, targets + 0.1 * rng.random(200)) == 1
    scores = rng.random(200)
    plain = average_precision_score(targets, scores)
    assert plain <= average_precision(targets, scores) < plain + 0.1
    with pytest.raises(ValueError, match="no positive"):
        average_precision(np.zeros(3), np.arange(3.0))


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two Gaussian clouds in 6 dimensions that overlap: training and test features with targets."""
    rng = np.random.default_rng(1)
    targets = np.repeat([1, 0], [40, 80])
    test_targets = np.repeat([1, 0], [30, 60])
    shift = np.array([0.5, 0.5, 0, 0, 0, 0])
    train = rng.normal(size=(120, 6)) + targets[:, None] * shift
    test = rng.normal(size=(90, 6)) + test_targets[:, None] * shift
    return unit_length(train), targets, unit_length(test), test_targets


def test_unit_length() -> None:
    x = unit_length(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert x.dtype == np.float64  # as in VISSL
    np.testing.assert_allclose(x, [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-7)


def test_a_class_is_fitted_as_published(clouds: tuple[np.ndarray, ...]) -> None:
    train, targets, test, test_targets = clouds
    costs = (0.001, 0.1, 1.0)
    found = fit_class(
        train, targets, test, test_targets, costs=costs, folds=3, iterations=2000, seed=0
    )  # fmt: skip
    # The same by hand: folds of scikit-learn without shuffling take every class's first, second, last third.
    thirds = np.concatenate([np.repeat([0, 1, 2], [14, 13, 13]), np.repeat([0, 1, 2], [26, 27, 27])])
    means = []
    for cost in costs:
        aps = []
        for fold in range(3):
            svm = LinearSVC(C=cost, class_weight={1: 2, 0: 1}, max_iter=2000, dual=True, random_state=0)
            svm.fit(train[thirds != fold], targets[thirds != fold])
            scores = svm.decision_function(train[thirds == fold])
            aps.append(average_precision_score(targets[thirds == fold], scores))
        means.append(np.mean(aps))
    assert found["cost"] == costs[int(np.argmax(means))]
    assert found["cross_validated_ap"] == pytest.approx(max(means), abs=1e-6)
    svm = LinearSVC(C=found["cost"], class_weight={1: 2, 0: 1}, max_iter=2000, dual=True, random_state=0)
    svm.fit(train, targets)
    assert found["ap"] == average_precision(test_targets, svm.decision_function(test))
    assert found["ap"] > 0.5


def test_difficult_images_train_as_negatives_and_are_not_judged(clouds: tuple[np.ndarray, ...]) -> None:
    train, targets, test, test_targets = clouds
    options = {"costs": (1.0,), "folds": 3, "iterations": 2000, "seed": 0}
    marked = targets.copy()
    marked[-5:] = -1
    assert fit_class(train, marked, test, test_targets, **options) == fit_class(
        train, targets, test, test_targets, **options
    )
    hidden = test_targets.copy()
    hidden[::7] = -1
    kept = hidden != -1
    assert (
        fit_class(train, targets, test, hidden, **options)["ap"]
        == fit_class(train, targets, test[kept], test_targets[kept], **options)["ap"]
    )


def test_low_shot_draws_k_and_as_many_negatives_a_class(
    clouds: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, targets, test, test_targets = clouds
    targets = targets.copy()
    targets[-20:] = -1
    drawn: list[tuple[int, int]] = []
    real = LinearSVC.fit

    def noted(self, x, y):
        rows = [int(np.flatnonzero((train == row).all(1))[0]) for row in x]
        assert len(set(rows)) == len(rows)
        assert not (targets[rows] == -1).any()
        drawn.append((int((y == 1).sum()), int((y == -1).sum())))
        return real(self, x, y)

    monkeypatch.setattr(LinearSVC, "fit", noted)
    options = {
        "classes": 3, "label": 1, "costs": (0.1, 1.0), "shots": (1, 8), "samples": 4, "iterations": 2000,
    }  # fmt: skip
    found = np.array(fit_class_low_shot(train, targets, test, test_targets, seed=0, **options)["ap"])
    assert found.shape == (2, 4, 2)
    assert drawn == [(1, 2)] * 8 + [(8, 16)] * 8
    assert found[1].mean() > found[0].mean()
    again = np.array(fit_class_low_shot(train, targets, test, test_targets, seed=0, **options)["ap"])
    np.testing.assert_array_equal(found, again)
    other = np.array(fit_class_low_shot(train, targets, test, test_targets, seed=1, **options)["ap"])
    assert (found != other).any()


@pytest.fixture(scope="module")
def voc(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC2007 in small: each image is one of ten classes above one of ten others."""
    root = tmp_path_factory.mktemp("voc")
    folder = root / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, source, count in (("trainval", "train", 80), ("test", "test", 40)):
        data = open_dataset("cifar10", cifar_folder, source)
        shown = []
        for i in range(count):
            above, below = i % 10, (i // 10 + i) % 10
            picture = Image.new("RGB", (32, 64))
            for place, label in enumerate((above, below)):
                index = int(rng.choice(np.flatnonzero(data.labels_N == label)))
                picture.paste(data.image(index).resize((32, 32)), (0, 32 * place))
            picture.save(folder / "JPEGImages" / f"{part}{i:03d}.jpg")
            shown.append({above, 10 + below})
        for c, name in enumerate(CLASSES):
            marks = [1 if c in s else 0 if (c + i) % 37 == 0 else -1 for i, s in enumerate(shown)]
            lines = [f"{part}{i:03d} {mark:2d}\n" for i, mark in enumerate(marks)]
            (folder / "ImageSets" / "Main" / f"{name}_{part}.txt").write_text("".join(lines))
    return root


def test_voc07_is_read_with_its_difficult_images(voc: Path) -> None:
    data, targets = open_voc07(voc, "train")
    assert (len(data), targets.shape) == (80, (80, 20))
    assert data.image(0).size == (32, 64)
    assert sorted(np.unique(targets)) == [-1, 0, 1]
    assert ((targets == 1).sum(1) == 2).all()  # by construction
    assert (targets[np.arange(80), data.labels_N] == 1).all()
    assert open_voc07(voc / "VOCdevkit" / "VOC2007", "test")[0].files == [
        f"test{i:03d}.jpg" for i in range(40)
    ]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "JPEGImages" / "test003.jpg").unlink(), "1 of 40 images of test are missing"),
        (lambda f: (f / "ImageSets" / "Main" / "cow_test.txt").unlink(), "cow_test.txt: missing"),
        (lambda f: (f / "ImageSets" / "Main" / "cow_test.txt").write_text("test000 2\n"), "1, 0 or -1"),
        (lambda f: (f / "ImageSets" / "Main" / "cow_test.txt").write_text("x 1\n"), "lists other images"),
    ],
)
def test_a_damaged_voc07_is_named(voc: Path, tmp_path: Path, harm, message: str) -> None:
    import shutil

    shutil.copytree(voc, tmp_path / "copy")
    harm(tmp_path / "copy" / "VOCdevkit" / "VOC2007")
    with pytest.raises(UserError, match=message):
        open_voc07(tmp_path / "copy", "test")
    with pytest.raises(UserError, match="holds no VOC2007"):
        open_voc07(tmp_path, "test")


def _protocol(folder: Path, name: str, **values: object) -> str:
    import yaml

    content = {
        "task": "linear", "title": "t", "source": "s",
        "values": {"method": "svm", "augmentation": False, "costs": [0.1, 1.0], "iterations": 200} | values,
    }  # fmt: skip
    path = folder / f"{name}@1.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    "command", ["knn --protocol solo_knn@1", "linear --protocol logreg@1",
                "semisup --protocol intl_semisup_as_released@1 --label-percent 1"],
)  # fmt: skip
def test_voc07_with_another_evaluator_says_what_it_goes_with(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{command} --weights w.pth --dataset voc07 --data-dir {tmp_path} --output {tmp_path}/out"
    assert transfer(words.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --dataset voc07") and "linear` with --protocol voc07_svm@2" in told


def test_the_command_on_voc07(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--weights", "raw-pixels", "--dataset", "voc07", "--data-dir", str(voc), "--image-size", "8",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert linear([*words, "--protocol", _protocol(tmp_path, "full", folds=3)]) == 0
    low = _protocol(tmp_path, "low", shots=[1, 2], samples=2, choose_on="reported")
    assert linear([*words, "--protocol", low]) == 0
    full, few = results.read(tmp_path / "out")
    assert (full.dataset, full.n, full.selection, full.task) == ("voc07", 40, "held-out", "linear")
    assert full.metrics["mAP"] == pytest.approx(np.mean(list(full.settings["AP"].values())), abs=0.01)
    chance = 100 * float(np.mean((open_voc07(voc, "test")[1] == 1).mean()))
    assert full.metrics["mAP"] > 1.5 * chance
    assert (set(few.metrics), few.selection) == ({"mAP_k1", "mAP_k2"}, "best")
    capsys.readouterr()
    assert linear([*words, "--protocol", low]) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(results.read(tmp_path / "out")) == 2


def test_a_suite_takes_voc07(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "new.pth")
    torch.save(checkpoint_zoo.backbone(), tmp_path / "w.pth")
    words = f"--weights {tmp_path}/w.pth --dataset voc07 --data-dir {voc} --output {tmp_path}/out --dry-run"
    assert suite([*words.split(), "--tasks", "linear"]) is None
    told = capsys.readouterr().out
    assert "all checks passed" in told and "--protocol voc07_svm@2 --dataset voc07" in told
    with pytest.raises(UserError, match="1 check failed"):
        suite([*words.split(), "--tasks", "linear,knn"])
    with pytest.raises(UserError, match="1 check failed"):
        suite([*words.replace("w.pth", "new.pth").split(), "--tasks", "linear"])
    told = capsys.readouterr().out
    assert "new.pth: never trained" in told and "its images show several classes each" in told


def test_the_published_protocols_and_too_few_images(cifar_folder: Path) -> None:
    low = load_protocol("voc07_svm_low_shot@1", "linear").settings(LinearProtocol)
    full = load_protocol("voc07_svm@1", "linear").settings(LinearProtocol)
    assert (low.shots, low.samples, full.shots, full.folds) == ((1, 2, 4, 8, 16, 32, 64, 96), 5, (), 3)
    assert low.costs == full.costs == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    data = open_dataset("cifar10", cifar_folder, "train")
    targets = np.eye(10, dtype=int)[data.labels_N]
    check_shots(data, targets, targets, full)
    with pytest.raises(UserError, match=f"{len(data) // 10} images of class .*96 shots"):
        check_shots(data, targets, targets, low)
    lost = targets.copy()
    lost[:, 3] = 0
    with pytest.raises(UserError, match=f"no image of class '{data.classes[3]}'"):
        check_shots(data, targets, lost, full)
