"""Linear heads: each equals a torch.optim run of its own; a stopped run ends with the same weights."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from pretrain.common.errors import RunFailed, UserError
from pretrain.common.signals import Stopped, StopSignals
from pretrain.data.datasets import ImageDataset
from tests.helpers.tiny_resnet import save_tiny
from transfer.evaluation import results
from transfer.evaluation.accuracy import accuracy
from transfer.evaluation.augment import drawn_box
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators import linear
from transfer.evaluators.epoch_order import epoch_batches, steps_of
from transfer.evaluators.heads import HeadGrid, HeadGrids, rate_factor
from transfer.evaluators.linear_features import held_out_part, held_out_split
from transfer.evaluators.logreg import fit_logreg


def batches(n: int = 12, b: int = 16, d: int = 6, classes: int = 3):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(b, d, generator=g), torch.randint(0, classes, (b,), generator=g)) for _ in range(n)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_each_head_trains_as_it_would_alone(optimizer: str, init: str) -> None:
    rates, decays = [0.3, 0.01], [0.0, 0.1]
    heads = HeadGrid(6, 3, rates=rates, decays=decays, optimizer=optimizer, init=init, seed=5)
    starts = [p.clone() for p in heads.parameters]
    losses = [heads.step(x, y, factor=1 / (i + 1)) for i, (x, y) in enumerate(batches())]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    for h, (rate, decay) in enumerate(heads.grid):
        weight, bias = (p[:, h].squeeze(0).clone().requires_grad_() for p in starts)
        alone = kind(
            [weight, bias], lr=rate, weight_decay=decay, **({"momentum": 0.9} if optimizer == "sgd" else {})
        )
        for i, (x, y) in enumerate(batches()):
            alone.param_groups[0]["lr"] = rate / (i + 1)
            loss = cross_entropy(x @ weight + bias, y)
            alone.zero_grad()
            loss.backward()
            alone.step()
            assert float(losses[i][h]) == pytest.approx(float(loss), rel=1e-4)
        torch.testing.assert_close(heads.parameters[0][:, h], weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.parameters[1][0, h], bias.detach(), rtol=1e-4, atol=1e-5)


def test_lars_scales_by_the_norms() -> None:
    # One step from W, b = 0: b takes the plain gradient, W's is scaled by 0.001 |W| / (|g| + 0.5 |W|).
    x, y = batches(1)[0]
    heads = HeadGrid(6, 3, rates=[2.0], decays=[0.5], optimizer="lars", seed=1)
    weight = heads.parameters[0][:, 0].clone().requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    cross_entropy(x @ weight + bias, y).backward()
    heads.step(x, y, factor=1.0)
    w, g = weight.detach(), weight.grad
    trust = 0.001 * w.norm() / (g.norm() + 0.5 * w.norm())
    torch.testing.assert_close(heads.parameters[0][:, 0], w - 2 * trust * (g + 0.5 * w))
    torch.testing.assert_close(heads.parameters[1][0, 0], -2 * bias.grad)


def test_schedules_by_hand() -> None:
    def at(schedule, step, **more):
        return rate_factor(schedule, step=step, steps_per_epoch=10, epochs=4, **more)

    assert [at("steps", s, milestones=(1, 3)) for s in (9, 10, 30)] == pytest.approx([1, 0.1, 0.01])
    assert at("cosine", 20) == pytest.approx(0.5) and at("cosine", 25) < 0.5
    assert at("cosine_by_epoch", 25) == pytest.approx(0.5)
    assert at("exponential", 20, final=1e-4) == pytest.approx(1e-2)
    assert at("constant", 39) == 1


def test_the_rate_of_lightlys_benchmark_is_lightlys() -> None:
    # Its LinearClassifier: one CosineWarmupScheduler over all steps, without warm-up.
    from lightly.utils.scheduler import CosineWarmupScheduler

    values = load_protocol("lightly_linear@1").settings(linear.LinearProtocol)
    total = 20 * values.epochs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineWarmupScheduler(optimizer, warmup_epochs=0, max_epochs=total)
    for step in (0, 1, 19, 20, total // 3, total // 2 + 7, total - 1):
        ours = rate_factor(
            values.schedule, step=step, steps_per_epoch=20, epochs=values.epochs, final=values.final
        )
        assert ours == pytest.approx(theirs.scale_lr(step), abs=2 / total)  # they end one step earlier


def test_accuracies_by_hand() -> None:
    # Classes 0, 0, 1: right, wrong, tie that the smaller label 0 wins. Top-1 1/3; per class (1/2 + 0) / 2.
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    got = accuracy(logits, torch.tensor([0, 0, 1]))
    assert got == pytest.approx({"top1": 100 / 3, "top5": 100.0, "mean_per_class": 25.0})


def test_logistic_regression_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([x for x, _ in batches()]).double()
    y = torch.cat([y for _, y in batches()])
    fit = fit_logreg(x, y, 3, cost=0.05, iterations=500)
    wanted = LogisticRegression(C=0.05, tol=1e-8, max_iter=2000).fit(x.numpy(), y.numpy())
    got = fit.scores(x).softmax(1)
    np.testing.assert_allclose(got.numpy(), wanted.predict_proba(x.numpy()), atol=2e-4)


def ill_conditioned() -> tuple[torch.Tensor, torch.Tensor]:
    """400 x 24 positive features whose scales differ by up to 10^4, as of a raw backbone, and 4 classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    x = np.abs(0.8 * rng.normal(size=(4, 24))[labels] + rng.normal(size=(400, 24))) * 10 ** rng.uniform(
        -3, 1, 24
    )
    return torch.from_numpy(x), torch.from_numpy(labels)


@pytest.mark.parametrize("cost", [1e-6, 1.0, 1e5])
def test_logistic_regression_reaches_the_minimum_whatever_the_cost(cost: float) -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = ill_conditioned()
    wanted = LogisticRegression(C=cost, solver="newton-cg", tol=1e-10, max_iter=500).fit(x.numpy(), y.numpy())
    log_p = wanted.predict_log_proba(x.numpy())
    least = -log_p[np.arange(400), y].sum() + np.square(wanted.coef_).sum() / (2 * cost)
    fit = fit_logreg(x.float(), y, 4, cost=cost, iterations=20_000)
    assert fit.weight_DC.dtype == torch.float64 and fit.converged
    assert least * (1 - 1e-6) <= fit.objective <= least * (1 + 1e-4) + 1e-9


def test_a_logistic_regression_that_was_cut_off_knows_it() -> None:
    x, y = ill_conditioned()
    short, long = (fit_logreg(x, y, 4, cost=1e5, iterations=n) for n in (5, 20_000))
    assert not short.converged and short.iterations == 5 and long.converged
    assert short.objective - long.objective <= short.gap  # the bound is one
    # A warm start from another cost ends at the same minimum.
    far = fit_logreg(x, y, 4, cost=1e-3, iterations=1000)
    warm = fit_logreg(x, y, 4, cost=1e5, iterations=20_000, start=(far.weight_DC, far.bias_C))
    assert warm.objective == pytest.approx(long.objective, rel=2e-4)


def test_held_out_images_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 30, 2])
    fit, aside = held_out_split(labels, 10, seed=0)
    assert np.bincount(labels[aside]).tolist() == [10, 3, 1]
    assert sorted([*fit, *aside]) == list(range(132))
    assert not np.array_equal(aside, held_out_split(labels, 10, seed=1)[1])
    fit, aside = held_out_split(labels, 20, seed=0, per_class=False)
    assert len(aside) == 26 and sorted([*fit, *aside]) == list(range(132))  # 20 % of 132 is 26.4


def test_an_epoch_shows_every_image_once() -> None:
    got = epoch_batches(10, 4, steps=3, seed=0, epoch=1)
    assert [len(b) for b in got] == [4, 4, 2] and sorted(np.concatenate(got)) == list(range(10))
    more = epoch_batches(10, 4, steps=5, seed=0, epoch=1)
    assert [len(b) for b in more] == [4] * 5 and sorted(np.concatenate(more)) == sorted([*range(10)] * 2)


def test_crops_lie_within_the_image() -> None:
    rng = np.random.default_rng(0)
    left, top, width, height = np.array([drawn_box(40, 30, rng) for _ in range(500)]).T
    assert min(left.min(), top.min()) >= 0 and (left + width <= 40).all() and (top + height <= 30).all()
    share = width * height / 1200
    assert 0.07 < share.min() < 0.15 and share.max() > 0.8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "random.safetensors", image_size=32)


def argv(weights: object, folder: Path, output: Path, protocol: object) -> list[str]:
    return [
        "--weights", str(weights), "--dataset", "cifar10", "--data-dir", str(folder), "--output", str(output),
        "--protocol", str(protocol), "--cache-dir", str(output.parent / "cache"), "--image-size", "32",
    ]  # fmt: skip


def own(folder: Path, **values: object) -> Path:
    path = folder / "mine@1.yaml"
    path.write_text(yaml.safe_dump({"task": "linear", "title": "t", "source": "s", "values": values}))
    return path


def test_cached_heads_by_command(cifar_folder: Path, tmp_path: Path) -> None:
    words = argv("raw-pixels", cifar_folder, tmp_path / "out", "cached_linear@1")
    assert linear.main(words) == 0 and linear.main(words) == 0
    last, chosen = results.read(tmp_path / "out")
    assert (last.selection, chosen.selection, last.n, last.seed) == ("last", "held-out", 160, 0)
    assert chosen.metrics["top1"] > 15 and chosen.settings["heads"] == 12
    assert chosen.settings["augmentation"] is False and chosen.settings["world_size"] == 1
    again = tmp_path / "again"
    assert linear.main(argv("raw-pixels", cifar_folder, again, "cached_linear@1")) == 0
    assert [r.metrics for r in results.read(again)] == [last.metrics, chosen.metrics]


def test_heads_that_diverge_are_told_and_leave_the_others_alone(
    cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calm = {"augmentation": False, "scaling": "standardise", "epochs": 3, "held_out_percent": 10}
    found = {}
    for name, rates in (("both", [0.01, 1e38]), ("one", [0.01])):
        protocol = own(tmp_path, learning_rates=rates, **calm)
        assert linear.main(argv("raw-pixels", cifar_folder, tmp_path / name, protocol)) == 0
        found[name] = [r.metrics for r in results.read(tmp_path / name)]
    assert found["both"] == found["one"]
    told = [r.getMessage() for r in caplog.records if "diverged" in r.getMessage()]
    assert told == [
        "1 of 2 heads diverged by epoch 1 (learning rates 1e+38); the others are not touched by it"
    ]
    protocol = own(tmp_path, learning_rates=[1e37, 1e38], **calm)
    with pytest.raises(
        RunFailed, match=r"diverged: by epoch 1, step 3, .* a learning rate of 1e\+37, 1e\+38"
    ):
        linear.main(argv("raw-pixels", cifar_folder, tmp_path / "none", protocol))
    assert not results.read(tmp_path / "none")


class StopAfter(StopSignals):
    """Asks to stop when it has been read so many times."""

    reads = 0
    limit = 0

    @property
    def requested(self) -> bool:
        type(self).reads += 1
        return self.reads == self.limit

    def hand_over(self) -> None:
        raise Stopped("stopped")


def test_augmented_heads_stop_and_go_on_to_the_bit(cifar_folder, weights, tmp_path, monkeypatch) -> None:
    protocol = own(
        tmp_path, learning_rates=[0.1, 0.02], batch=64, epochs=3, held_out_percent=10, steps_per_epoch=3,
        features=["layer4", "layer2+layer4"],
    )  # fmt: skip
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert linear.main(argv(weights, cifar_folder, whole, protocol)) == 0
    monkeypatch.setattr(linear, "StopSignals", StopAfter)
    StopAfter.reads, StopAfter.limit = 0, 2
    with pytest.raises(Stopped):
        linear.main(argv(weights, cifar_folder, halves, protocol))
    assert (halves / linear.CHECKPOINT).exists() and not results.read(halves)
    StopAfter.limit = math.inf
    assert linear.main(argv(weights, cifar_folder, halves, protocol)) == 0
    assert not (halves / linear.CHECKPOINT).exists()
    first, second = results.read(whole), results.read(halves)
    assert [(r.metrics, r.epoch, r.settings) for r in first] == [
        (r.metrics, r.epoch, r.settings) for r in second
    ]
    assert first[0].epoch == 3 and first[0].settings["augmentation"] is True


def test_a_probe_goes_on_from_its_own_precision_and_test_images_alone(
    cifar_folder, weights, tmp_path, monkeypatch
) -> None:
    seen: list[str] = []

    def resume(path: Path, heads: object, identity: str) -> None:
        seen.append(identity)
        raise Stopped("seen")

    monkeypatch.setattr(linear, "_resume", resume)
    monkeypatch.setattr(linear, "cached_parts", lambda *_: (None, None, None, np.arange(64)))
    other = tmp_path / "other"
    shutil.copytree(cifar_folder, other)
    os.utime(next((other / "test").rglob("*.jpg")), ns=(1, 1))
    for folder, precision in ((cifar_folder, "float32"), (cifar_folder, "bfloat16"), (other, "float32")):
        with pytest.raises(Stopped):
            words = argv(weights, folder, tmp_path / "out", "moco_linear@1")
            linear.main([*words, "--precision", precision])
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [  # DINOv2's make_classification_train_transform is bicubic, DINO's and all others' default to bilinear
        ("dinov2_sweep@1", "bicubic"), ("dinov2_sweep@2", "bicubic"), ("dinov2_sweep_on_val@1", "bicubic"),
        ("dino_linear@1", "bilinear"), ("moco_linear@1", "bilinear"),
    ],
)  # fmt: skip
def test_crops_are_trained_on_in_the_published_interpolation(
    protocol: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(linear, "Augmented", lambda *_, interpolation, **__: seen.append(interpolation))
    values = load_protocol(protocol).settings(linear.LinearProtocol)
    evaluation = SimpleNamespace(
        settings=SimpleNamespace(workers=0), train=None, seed=0, transform=EvalTransform(size=224)
    )
    batches = linear._augmented(
        evaluation, SimpleNamespace(device=torch.device("cpu")), values, np.arange(0), [], 0
    )
    assert list(batches) == [] and seen == [wanted]


def test_logistic_regression_by_command(cifar_folder: Path, tmp_path: Path) -> None:
    protocol = own(
        tmp_path, method="logreg", augmentation=False, scaling="l2", costs=[1e-6, 1.0, 100.0], iterations=50,
        held_out_percent=10,
    )  # fmt: skip
    assert linear.main(argv("raw-pixels", cifar_folder, tmp_path / "out", protocol)) == 0
    (found,) = results.read(tmp_path / "out")
    assert found.selection == "held-out" and found.metrics["top1"] > 15 and found.settings["C"] > 1e-6
    assert found.settings["converged"] is (not found.warnings)


def test_a_sets_own_validation_part_is_held_out_where_it_has_one(tmp_path: Path) -> None:
    from scipy.io import savemat

    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "val1.txt").write_text("banded/b.jpg\ndotted/d.jpg\n")
    savemat(tmp_path / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 3]], "tstid": [[5]]})
    files = {
        "dtd": [f"images/{n}.jpg" for n in ("banded/a", "banded/b", "dotted/c", "dotted/d")],
        "flowers102": [f"jpg/image_{i:05d}.jpg" for i in (1, 4, 2, 3)],
        "aircraft": [f"data/images/{i}.jpg" for i in range(4)],  # whose list is not there
    }
    values = load_protocol("ssl_transfer_logreg@1").settings(linear.LinearProtocol)
    parts = {}
    for name, listed in files.items():
        train = ImageDataset(
            name=name, split="train", classes=["a", "b"], labels_N=np.array([0, 0, 1, 1]), native_size=None,
            root=tmp_path, files=listed,
        )  # fmt: skip
        parts[name] = [x.tolist() for x in held_out_part(train, values, seed=0)]
    assert parts["dtd"] == [[0, 2], [1, 3]] and parts["flowers102"] == [[0, 1], [2, 3]]
    fit, aside = parts["aircraft"]
    assert len(aside) == 1 and sorted(fit + aside) == [0, 1, 2, 3]  # 20 % of 4, at least one
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images_variant_val.txt").write_text("2 Boeing 747-400\n3 A320\n")
    train = ImageDataset(
        name="aircraft", split="train", classes=["a", "b"], labels_N=np.array([0, 0, 1, 1]), native_size=None,
        root=tmp_path, files=files["aircraft"],
    )  # fmt: skip
    assert held_out_part(train, values, seed=0)[1].tolist() == [2, 3]


def test_heads_that_learn_nothing_are_marked(
    cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"augmentation": False, "epochs": 2, "batch": 64, "choose_on": "reported"}
    for name, rate, marked in (("wild", 3e4, True), ("calm", 1e-3, False)):
        protocol = own(tmp_path, learning_rates=[rate], **values)
        assert linear.main(argv("raw-pixels", cifar_folder, tmp_path / name, protocol)) == 0
        found = results.read(tmp_path / name)
        assert [bool(r.warnings) for r in found] == [marked, marked]
        told = [r.message for r in caplog.records if "smaller learning_rates" in r.message]
        assert len(told) == marked and all("nothing was learnt" in text for text in told)
        caplog.clear()


@pytest.mark.parametrize(
    ("rates", "told"), [([1e-6, 1e-3], "largest"), ([1e-3, 1e38], "smallest"), ([1e-6, 1e-3, 1e38], None)]
)
def test_a_best_learning_rate_at_the_end_of_the_grid_is_told(
    rates: list[float], told: str | None, cifar_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    values = {"augmentation": False, "scaling": "standardise", "epochs": 3, "held_out_percent": 20}
    protocol = own(tmp_path, learning_rates=rates, **values)
    assert linear.main(argv("raw-pixels", cifar_folder, tmp_path / "o", protocol)) == 0
    messages = [r.getMessage() for r in caplog.records if "the best learning rate" in r.getMessage()]
    assert len(messages) == (told is not None) and all(f"0.001, is the {told}" in text for text in messages)


def test_images_that_cannot_be_read_are_as_if_they_were_not_there(few_images: Path, tmp_path: Path) -> None:
    protocol = own(
        tmp_path, augmentation=False, scaling="standardise", epochs=2, batch=50, learning_rates=[1e-2],
        choose_on="reported",
    )  # fmt: skip
    found = {}
    for name in ("broken", "absent"):
        folder = tmp_path / name
        shutil.copytree(few_images, folder)
        for part in ("train", "test"):
            images = sorted((folder / part).rglob("*.jpg"))
            image = images[len(images) // 2]
            image.write_bytes(b"no image") if name == "broken" else image.unlink()
        words = [*argv("raw-pixels", folder, tmp_path / f"of_{name}", protocol), "--max-broken-images", "2"]
        assert linear.main(words) == 0
        found[name] = [(r.metrics, r.n) for r in results.read(tmp_path / f"of_{name}")]
    assert found["broken"] == found["absent"] and {n for _, n in found["absent"]} == {19}


def test_the_last_iteration_alone_is_reported_where_the_protocol_says_so(
    cifar_folder: Path, tmp_path: Path
) -> None:
    protocol = own(
        tmp_path, augmentation=False, epochs=3, batch=100, learning_rates=[1e-3, 1e-4], choose_on="reported",
        choose_epoch="last", drop_last=True,
    )  # fmt: skip
    assert linear.main(argv("raw-pixels", cifar_folder, tmp_path / "o", protocol)) == 0
    (found,) = results.read(tmp_path / "o")  # 640 images: 6 whole batches of 100 an epoch
    assert (found.selection, found.epoch, found.settings["chosen_on"]) == ("best", 3, "reported")
    assert steps_of(640, 100, drop_last=True) == 6 and steps_of(640, 100) == 7
    assert found.metrics["top1"] == max(head["top1"] for head in found.settings["sweep"])


def test_bad_input_before_the_work(cifar_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raw-pixels"):
        linear.main(argv("raw-pixels", cifar_folder, tmp_path / "o", "moco_linear@1"))
    copy = tmp_path / "copy"
    shutil.copytree(cifar_folder, copy)
    shutil.rmtree(next((copy / "test").iterdir()))
    words = argv("raw-pixels", copy, tmp_path / "o", "cached_linear@1")
    with pytest.raises(UserError, match="has 9 classes, cifar10 has 10: is a class folder missing"):
        linear.main(words)
    with pytest.raises(UserError, match="only in train"):
        linear.main([*words, "--dataset", "imagefolder"])
    assert not (tmp_path / "o" / "results.jsonl").exists()


@pytest.mark.parametrize("protocol", ["cached_linear@1", "logreg@1"])
def test_a_choice_needs_held_out_images(protocol: str, cifar_folder: Path, tmp_path: Path) -> None:
    for image in (i for c in (cifar_folder / "train").iterdir() for i in sorted(c.iterdir())[:1]):
        (tmp_path / "train" / image.parent.name).mkdir(parents=True)
        shutil.copy(image, tmp_path / "train" / image.parent.name)
    shutil.copytree(cifar_folder / "test", tmp_path / "test")
    with pytest.raises(
        UserError, match=r"one training image a class, .* 10 % of each class's held out; want"
    ):
        linear.main(argv("raw-pixels", tmp_path, tmp_path / "o", protocol))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="logreg needs held_out_percent above 0"):
        mine = own(tmp_path, method="logreg", augmentation=False, costs=[1.0, 2.0])
        linear.main(argv("raw-pixels", tmp_path, tmp_path / "o", mine))


def test_maes_probe_equals_its_modules() -> None:
    """BatchNorm1d(affine=False, eps=1e-6), Linear and LARS of matrices alone, with a warm-up, in float64.

    LARS by hand (https://github.com/facebookresearch/mae, util/lars.py): the weight's gradient times
    0.001 |W| / |g|, the bias' as it is; momentum 0.9. The rate by its util/lr_sched.py.
    """
    torch.manual_seed(0)
    rate, width, classes, steps, per_epoch = 6.4, 5, 3, 6, 2
    heads = HeadGrids(
        {"all": torch.arange(width)}, classes, rates=[rate], decays=[0.0], optimizer="lars_weights", seed=1,
        norm_batch=8,
    )  # fmt: skip
    grid = heads.grids["all"]
    grid.parameters = [p.double() for p in grid.parameters]
    grid.slots = [[s.double() for s in slots] for slots in grid.slots]
    assert heads.norm is not None
    heads.norm.running = tuple(r.double() for r in heads.norm.running)
    norm = torch.nn.BatchNorm1d(width, affine=False, eps=1e-6).double()
    weight, bias = grid.parameters[0][:, 0].T.clone(), grid.parameters[1][0, 0].clone()
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(steps):
        x, y = torch.randn(16, width, dtype=torch.float64) * 3 + 1, torch.randint(0, classes, (16,))
        epoch = step / per_epoch
        factor = epoch / 1 if epoch < 1 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (3 - 1)))
        assert rate_factor(
            "cosine", step=step, steps_per_epoch=per_epoch, epochs=3, warmup_epochs=1
        ) == pytest.approx(factor)
        heads.step(x, y, factor=factor)
        first, second = x.chunk(2)  # as two GPUs of 8 images; the first one's statistics are kept
        other = torch.nn.functional.batch_norm(second, None, None, training=True, eps=1e-6)
        z = torch.cat([norm.train()(first), other])
        parameters = [weight.requires_grad_(True), bias.requires_grad_(True)]
        loss = cross_entropy(z @ weight.T + bias, y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            scaled = gradients[0] * (0.001 * weight.norm() / gradients[0].norm())
            for parameter, gradient, momentum in zip(parameters, (scaled, gradients[1]), momenta):
                momentum.mul_(0.9).add_(gradient)
                parameter.sub_(rate * factor * momentum)
        weight, bias = weight.detach(), bias.detach()
    torch.testing.assert_close(grid.parameters[0][:, 0].T, weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grid.parameters[1][0, 0], bias, rtol=1e-6, atol=1e-9)
    x = torch.randn(4, width, dtype=torch.float64)
    torch.testing.assert_close(heads.logits(x)[:, 0], norm.eval()(x) @ weight.T + bias, rtol=1e-6, atol=1e-8)
    again = HeadGrids(
        {"all": torch.arange(width)}, classes, rates=[rate], decays=[0.0], optimizer="lars_weights", seed=2,
        norm_batch=8,
    )  # fmt: skip
    again.load(heads.state())  # a probe that goes on has the running statistics too
    torch.testing.assert_close(again.logits(x.float()), heads.logits(x).float(), rtol=1e-4, atol=1e-5)


def test_a_regression_without_intercept_is_scikit_learns_kind_of_minimum() -> None:
    """MSN's: sum of CE + 0.0025 |W|^2 / 2, no constant; the gradient of that is 0 at what is found."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 6, dtype=torch.float64) + 0.5, torch.randint(0, 3, (40,))
    fit = fit_logreg(x, y, 3, cost=400, iterations=5000, intercept=False)
    assert fit.converged and not fit.bias_C.any()
    weight = fit.weight_DC.clone().requires_grad_(True)
    loss = cross_entropy(x @ weight, y, reduction="sum") + 0.0025 * weight.square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.norm()) < 1e-3 and float(loss) == pytest.approx(fit.objective)
    free = fit_logreg(x, y, 3, cost=400, iterations=5000)
    assert free.objective < fit.objective and float(free.bias_C.norm()) > 1e-3
    values = load_protocol("msn_low_shot@1").settings(linear.LinearProtocol)
    assert 1 / values.costs[0] == 0.0025 and values.stages == ("block-1.cls.unnormed",)
