"""Fine-tuning: published schedules, steps against plain torch, stop and go on to the bit, two ranks."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pretrain.checkpoint import load_checkpoint
from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.process_group import rank
from pretrain.common.signals import Stopped
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_resnet import save_tiny
from transfer.evaluation import results
from transfer.evaluation.accuracy import percentages, places
from transfer.evaluation.protocol import load_protocol
from transfer.evaluators.epoch_order import epoch_batches
from transfer.evaluators.finetune import FineTuning, joined
from transfer.evaluators.heads import rate_factor
from transfer.evaluators.semisup import FineTuneProtocol, main


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def _protocol(folder: Path, **values: object) -> str:
    rates = {
        "lr_backbone": {"1": 0.01, "10": 0.01, "100": 0.01},
        "lr_head": {"1": 0.1, "10": 0.1, "100": 0.1},
    }
    content = {
        "task": "semisup", "title": "t", "source": "s",
        "values": {**rates, "batch": 16, "epochs": 2} | values,
    }  # fmt: skip
    path = folder / "tiny@1.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def words(weights: Path, cifar_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "--weights", str(weights), "--protocol", _protocol(tmp_path), "--dataset", "cifar10",
        "--data-dir", str(cifar_folder), "--label-percent", "10", "--workers", "0",
    ]  # fmt: skip


def _factors(name: str) -> list[float]:
    p = load_protocol(name, "semisup").settings(FineTuneProtocol)
    return [
        rate_factor(
            p.schedule, step=e * 7, steps_per_epoch=7, epochs=p.epochs, milestones=p.milestones, gamma=p.gamma
        )
        for e in range(p.epochs)
    ]


def test_published_rates_and_schedules() -> None:
    published = {
        "intl_semisup_as_released@1": {1: (0.004, 0.2), 10: (0.004, 0.2)},
        "intl_semisup_cosine@1": {1: (0.004, 0.2), 10: (0.004, 0.2)},
        "intl_ep800_semisup_cosine@1": {1: (0.006, 0.2), 10: (0.006, 0.2)},
        "swav_semisup@1": {1: (0.02, 5), 10: (0.01, 0.2)},
        "barlow_semisup@1": {1: (0.005, 0.5)},
        "vicreg_semisup@1": {1: (0.03, 0.08), 10: (0.01, 0.1)},
    }
    for name, rates in published.items():
        p = load_protocol(name, "semisup").settings(FineTuneProtocol)
        assert {int(k): p.rates(int(k)) for k in p.lr_head} == rates, name
        assert (p.batch, p.epochs, p.weight_decay, p.momentum) == (256, 20, 0, 0.9)
        assert (p.sync_bn, p.head_init) == ((True, "uniform") if "swav" in name else (False, "normal"))
    assert _factors("intl_semisup_as_released@1") == [1.0] * 20  # its steps lie beyond the last epoch
    swav = _factors("swav_semisup@1")
    assert swav == pytest.approx([1.0] * 12 + [0.2] * 4 + [0.04] * 4)
    for name in ("intl_semisup_cosine@1", "barlow_semisup@1", "vicreg_semisup@1"):
        # (1 + cos(pi e / 20)) / 2 at e = 0, 5, 10, 19
        at = [_factors(name)[e] for e in (0, 5, 10, 19)]
        assert at == pytest.approx([1, 0.8535534, 0.5, 0.0061558], abs=1e-6)
    scaled = FineTuneProtocol(lr_backbone={"1": 0.004}, lr_head={"1": 0.2}, lr_per_256=True, batch=512)
    assert scaled.rates(1) == pytest.approx((0.008, 0.4))


class Small(nn.Module):
    """A backbone of a convolution, BatchNorm and a global average."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu().mean((2, 3))


def _learner(backbone: nn.Module, **other: object) -> FineTuning:
    options = {
        "classes": 5, "lr_backbone": 0.05, "lr_head": 0.7, "momentum": 0.9, "weight_decay": 0.01,
        "head_init": "normal", "sync_bn": False, "seed": 3, "dtype": torch.float32,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return FineTuning(backbone, **(options | other))  # type: ignore[arg-type]


def test_steps_are_those_of_sgd_with_two_rates_in_train_mode() -> None:
    torch.manual_seed(1)
    learner = _learner(Small())
    reference = copy.deepcopy(learner.model)
    sgd = torch.optim.SGD(
        [
            {"params": reference.backbone.parameters(), "lr": 0.05 * 0.5},
            {"params": reference.head.parameters(), "lr": 0.7 * 0.5},
        ],
        momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    for _ in range(3):
        x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
        loss = learner.step(x, y, batch_global=6, factor=0.5)
        wanted = nn.functional.cross_entropy(reference.train()(x), y)
        sgd.zero_grad()
        wanted.backward()
        sgd.step()
        torch.testing.assert_close(loss, wanted.detach())
    state = reference.state_dict()
    assert int(state["backbone.bn.num_batches_tracked"]) == 3  # BatchNorm learnt its statistics too
    for key, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)


def test_heads_start_as_published() -> None:
    normal = _learner(Small(), classes=20000).model.head
    assert float(normal.weight.std()) == pytest.approx(0.01, rel=0.02)
    assert not normal.bias.any()
    uniform = _learner(Small(), head_init="uniform").model.head
    assert float(uniform.weight.abs().max()) > 0.1
    assert uniform.bias.any()
    state = torch.get_rng_state()
    assert torch.equal(_learner(Small()).model.head.weight, _learner(Small()).model.head.weight)
    assert not torch.equal(_learner(Small(), seed=4).model.head.weight, _learner(Small()).model.head.weight)
    del state


def test_places_and_percentages_by_hand() -> None:
    nan = float("nan")
    logits = torch.tensor(
        [[3.0, 1, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [nan, 0, 0, 0, 0, 0]]
    )
    # the largest; equal to a smaller label's and so second; equal to a larger label's; NaN: behind all others
    assert places(logits, torch.tensor([0, 1, 0, 0])).tolist() == [0, 1, 0, 5]
    found = percentages(torch.tensor([0, 1, 0, 5]), torch.tensor([0, 1, 0, 0]), 2)
    assert found == pytest.approx({"top1": 50, "top5": 75, "mean_per_class": 100 * (2 / 3 + 0) / 2})


def test_an_image_that_was_not_judged_is_noticed() -> None:
    place = torch.tensor([0, -1, 2])
    with pytest.raises(AssertionError, match="evaluated twice or not at all"):
        joined(place, torch.device("cpu"))
    assert joined(torch.tensor([0, 1, 2]), torch.device("cpu")).tolist() == [0, 1, 2]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    first, second = (epoch_batches(50, 16, seed=0, epoch=e, least=2) for e in (0, 1))
    assert [len(b) for b in first] == [16, 16, 16, 2]
    assert sorted(np.concatenate(first)) == list(range(50))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    filled = epoch_batches(49, 16, seed=0, epoch=0, least=2)  # one image alone would have no batch statistics
    assert [len(b) for b in filled] == [16, 16, 16, 2]
    assert filled[-1][1] == filled[0][0]


def _tensors(output: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(output / "checkpoint.pt")
    momenta = {f"momentum {k}": v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
    return {**state["model"], **momenta}


def _figures(output: Path) -> list[tuple]:
    return [(r.selection, r.epoch, r.metrics, r.settings) for r in results.read(output)]


def test_two_lines_are_written_once_and_the_output_says_so(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*words, "--output", str(out), "--label", "control"]) == 0
    last, best = results.read(out)
    epochs = json.loads((out / "epochs.json").read_text())
    assert (last.selection, last.epoch, best.selection) == ("last", 2, "best")
    assert last.metrics["top1"] == pytest.approx(epochs[1]["top1"], abs=1e-4)
    assert best.metrics["top1"] == pytest.approx(max(e["top1"] for e in epochs), abs=1e-4)
    assert (last.n, last.task, last.label_percent, last.seed, last.label) == (
        160,
        "semisup",
        10,
        0,
        "control",
    )
    assert last.settings["labels"] == "class-balanced draw, seed 0"
    assert last.settings["labels_n"] == 60
    assert json.loads((out / "progress.json").read_text())["done"] == 8  # 60 images in batches of 16, twice
    assert yaml.safe_load((out / "config.yaml").read_text())["label_percent"] == 10

    capsys.readouterr()
    assert main([*words, "--output", str(out)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(results.read(out)) == 2
    with pytest.raises(UserError, match="differs in labels"):
        main([*words, "--output", str(out), "--subset-seed", "1"])
    # killed between the two lines: the second is written, nothing is trained again
    (out / "results.jsonl").write_text((out / "results.jsonl").read_text().splitlines()[0] + "\n")
    before = _tensors(out)
    assert main([*words, "--output", str(out)]) == 0
    assert [r.selection for r in results.read(out)] == ["last", "best"]
    assert all(torch.equal(v, before[k]) for k, v in _tensors(out).items())
    assert main([*words, "--output", str(out), "--subset-seed", "1", "--force"]) == 0
    assert [r.settings["labels"][-1] for r in results.read(out)] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("at", [2, 4])  # within an epoch, at its end
def test_stopped_and_gone_on_is_the_same_to_the_bit(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--output", str(whole)]) == 0
    real, taken = FineTuning.step, []

    def signalled(self, *args, **options):
        taken.append(1)
        if len(taken) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(FineTuning, "step", signalled)
    with monkeypatch.context() as patch:
        # the handler before ours takes the signal again once everything is saved
        patch.setattr(signal, "getsignal", signal.getsignal)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with pytest.raises(Stopped):
                main([*words, "--output", str(parts)])
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not (parts / "results.jsonl").exists()
    assert load_checkpoint(parts / "checkpoint.pt")["step"] == at
    assert main([*words, "--output", str(parts)]) == 0
    assert len(taken) == 8  # no step twice
    one, other = _tensors(whole), _tensors(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert _figures(whole) == _figures(parts)


def _two_steps(sizes: tuple[int, ...], sync_bn: bool) -> list[torch.Tensor]:
    """Weights, statistics and losses after two steps on the same 7 images, shared out in parts of `sizes`."""
    torch.manual_seed(1)
    learner = _learner(Small(), sync_bn=sync_bn)
    torch.manual_seed(2)
    x, y = torch.randn(2, 7, 3, 8, 8), torch.randint(0, 5, (2, 7))
    losses = []
    for images, labels in zip(x, y):
        mine = images.split(sizes)[rank()], labels.split(sizes)[rank()]
        losses.append(sum_over_ranks(learner.step(*mine, batch_global=7, factor=1.0)))
    learner.share_buffers()
    return [v.detach().clone() for v in learner.model.state_dict().values()] + losses


def _save_two_steps(sync_bn: bool, file: Path) -> None:
    torch.save(_two_steps((5, 2), sync_bn), f"{file}{rank()}")


def test_unequal_shares_of_two_ranks_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    for sync_bn in (True, False):
        run_on_ranks(2, _save_two_steps, sync_bn, tmp_path / str(sync_bn))
        first, second = (torch.load(tmp_path / f"{sync_bn}{r}") for r in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        one = _two_steps((7,), sync_bn)
        same = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, first)]
        assert all(same) == sync_bn  # without, each rank normalises by its own images, as published


def _command(words: list[str]) -> None:
    assert main(words) == 0


def test_two_ranks_agree_with_one(words: list[str], tmp_path: Path) -> None:
    """With synchronised BatchNorm; 60 = 3 · 16 + 12 images, so that the last batch is another size."""
    # Rates so small that rounding is not blown up; the momenta, sums of gradients, are compared as well.
    rates = {"lr_backbone": {"10": 1e-6}, "lr_head": {"10": 1e-4}}
    words = [*words, "--protocol", _protocol(tmp_path, sync_bn=True, epochs=1, **rates)]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    run_on_ranks(2, _command, [*words, "--output", str(tmp_path / "two")])
    (one, _), (two, _) = (results.read(tmp_path / name) for name in ("one", "two"))
    assert two.n == one.n == 160
    assert (one.settings["world_size"], two.settings["world_size"]) == (1, 2)
    assert two.settings["train_loss"] == pytest.approx(one.settings["train_loss"], rel=1e-3)
    a, b = _tensors(tmp_path / "one"), _tensors(tmp_path / "two")
    for key in a:
        if a[key].is_floating_point():
            # float32 sums in another order, and a last stage of 1 x 1 maps that blows the difference up
            assert float((a[key] - b[key]).norm()) <= 5e-2 * float(a[key].norm()) + 1e-5, key


def test_all_labels_train_by_the_same_code_and_it_learns(words: list[str], tmp_path: Path) -> None:
    protocol = _protocol(tmp_path, batch=64, epochs=5)
    assert (
        main([*words, "--label-percent", "100", "--protocol", protocol, "--output", str(tmp_path / "o")]) == 0
    )
    last, _ = results.read(tmp_path / "o")
    assert (last.settings["labels"], last.settings["labels_n"], last.label_percent) == ("all", 640, 100)
    losses = [e["train_loss"] for e in json.loads((tmp_path / "o" / "epochs.json").read_text())]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.05


def test_a_diverging_run_ends_with_the_reason(words: list[str], tmp_path: Path) -> None:
    wild = {"10": 1e30}
    protocol = _protocol(tmp_path, lr_backbone=wild, lr_head=wild)
    where = r"in epoch 1, step \d+ of \d+, at learning rates of 1e\+30 \(backbone\) and 1e\+30 \(head\)"
    with pytest.raises(RunFailed, match=rf"the epoch's mean loss is (nan|inf) {where}; no result is written"):
        main([*words, "--protocol", protocol, "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o" / "results.jsonl").exists()
    # 64 labelled images are one step: its loss is finite, what it leaves is not
    protocol = _protocol(tmp_path, lr_backbone=wild, lr_head=wild, batch=64, epochs=1)
    with pytest.raises(RunFailed, match=r"no finite logits in epoch 1, step 1 of 1"):
        main([*words, "--protocol", protocol, "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o" / "results.jsonl").exists()


def test_a_run_that_learns_nothing_says_so(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = _protocol(tmp_path, lr_backbone={"10": 0.0}, lr_head={"10": 100.0}, epochs=3, batch=16)
    main([*words, "--protocol", protocol, "--output", str(tmp_path / "o")])
    told = [r.message for r in caplog.records if "smaller lr_backbone and lr_head" in r.message]
    assert (
        len(told) == 2 and "learning rates of 0 (backbone) and 100 (head)" in told[0]
    )  # while it runs, at its end
    assert "nothing was learnt" in told[1] and "a guess's (2.30)" in told[1]
    for marked in results.read(tmp_path / "o"):
        assert [w.partition(":")[0] for w in marked.warnings] == ["nothing was learnt"]
    caplog.clear()
    protocol = _protocol(tmp_path, lr_backbone={"10": 0.0}, lr_head={"10": 0.003}, epochs=10, batch=16)
    main([*words, "--protocol", protocol, "--output", str(tmp_path / "calm")])
    assert "guess" not in caplog.text
    assert [r.warnings for r in results.read(tmp_path / "calm")] == [[], []]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "raw-pixels"], "cannot be fine-tuned"),
        (["--protocol", "barlow_semisup@1"], "rates for 1 % of the labels, not for --label-percent 10"),
        (["--protocol", "solo_knn@1"], "is for knn"),
        (["--label-percent", "5"], "label-percent"),
        (["--weights", "nothing.pt"], "nothing.pt"),
        (["--lists", "nothing.txt"], "nothing.txt"),
        (["--save-every", "0"], "--save-every 0"),
    ],
)
def test_bad_options(words: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*words, *more, "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def _lose_a_class(folder: Path) -> None:
    shutil.rmtree(sorted((folder / "test").iterdir())[3])


def _swap(folder: Path) -> None:
    _lose_a_class(folder)
    (folder / "test").rename(folder / "kept")
    (folder / "train").rename(folder / "test")
    (folder / "kept").rename(folder / "train")


def _too_few(folder: Path) -> None:
    for file in sorted(sorted((folder / "train").iterdir())[2].iterdir())[3:]:
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [(_lose_a_class, "1 only in train"), (_swap, "train and val swapped"), (_too_few, "and .* has 3")],
)
def test_bad_data(words: list[str], cifar_folder: Path, tmp_path: Path, harm, message: str) -> None:
    shutil.copytree(cifar_folder, tmp_path / "data")
    harm(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        main([
            *words, "--dataset", "imagefolder", "--data-dir", str(tmp_path / "data"),
            "--output", str(tmp_path / "o"),
        ])  # fmt: skip
    assert not (tmp_path / "o").exists()
