"""The loss that settings ask for."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import load_checkpoint
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import read_jsonl
from pretrain.loss import CAPTURABLE, floor_of, loss_of
from pretrain.objectives.gaussian import sigreg_loss
from pretrain.objectives.intl import intl_loss, loss_floor
from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
from pretrain.objectives.spectral import power
from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
from pretrain.objectives.whitening import spectral_loss, w_mse_loss
from pretrain.settings import Settings, parse_recipe
from pretrain.train import train
from tests.helpers.training import CPU, tiny
from tests.pretrain.objectives.test_intl import views_of


def settings(**changes: object) -> Settings:
    return tiny(Path("d"), Path("o"), **changes)


ALONE = {
    "vicreg": vicreg_loss, "barlow_twins": barlow_twins_loss, "w_mse": w_mse_loss, "frossl": frossl_loss,
    "mmcr": mmcr_loss, "coding_rate": coding_rate_loss, "intl": intl_loss,
}  # fmt: skip


@pytest.mark.parametrize("ema", [False, True])
def test_each_objective_is_the_function_of_its_name(ema: bool) -> None:
    views = [z.detach() for z in views_of(32, 16, 3)]
    for name, function in ALONE.items():
        asked = settings(objective=name, ema=ema, projector_output=16)
        assert loss_of(asked)(views, 7) == function(views, momentum_target=ema)
    asked = settings(objective="sigreg", ema=ema, view_sizes=[24, 24, 16], blur_p=[0], solarise_p=[0])
    assert loss_of(asked)(views, 7) == sigreg_loss(views, step=7, global_views=2, momentum_target=ema)
    assert loss_of(asked)(views, 8).penalty != loss_of(asked)(views, 7).penalty  # other directions
    for asked in (settings(power=0.4), settings(objective="power", power=0.4), settings(transform="λ^-0.4")):
        expected = spectral_loss(views, power(0.4))
        assert loss_of(asked)(views, 0).total == pytest.approx(float(expected), rel=1e-12)


def test_what_a_graph_replays_is_compiled_as_one_and_asks_nothing_of_the_device() -> None:
    """A value that is read on the way ends a capture; here it would end what the compiler traces."""
    views = [z.detach().requires_grad_() for z in views_of(20, 24, 2)]
    for name in {*CAPTURABLE, "mmcr", "coding_rate"}:
        torch._dynamo.reset()
        loss = loss_of(settings(objective=name, projector_output=24))
        compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=False)
        if name in CAPTURABLE:
            found, wanted = (torch.autograd.grad(f(views, 0).total, views) for f in (compiled, loss))
            torch.testing.assert_close(found, wanted)
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(views, 0)


def test_names_and_floors() -> None:
    assert settings().method == settings(objective="intl").method == "INTL"
    assert settings(objective="barlow_twins").method == "Barlow Twins"
    assert settings(power=0.5).method == "λ^-0.5" and floor_of(settings(power=0.5)) == 0
    assert settings(transform="1/(λ+0.1)^0.5").method == "g(λ) = 1/(λ+0.1)^0.5"
    assert floor_of(settings()) == loss_floor(160, 64) and floor_of(settings(objective="mmcr")) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "power"}, "wants --power or --transform, got neither"),
        ({"power": 0.5, "transform": "λ"}, "wants --power or --transform, got both"),
        ({"objective": "intl", "power": 0.5}, "--power 0.5 would do nothing"),
        ({"objective": "vicreg", "trade_off": 0.1}, "--trade-off 0.1 would do nothing"),
        ({"objective": "mmcr", "whitening": "batch"}, "--whitening batch would do nothing"),
        ({"transform": "λ", "iterations": 5}, "--iterations 5 would do nothing"),
        ({"transform": "os.remove"}, "'os.remove' is not known here"),
        ({"objective": "w_mse", "projector_output": 256}, "does not fit --projector-output 256"),
        ({"objective": "w_mse", "projector_output": 50}, "does not fit --projector-output 50"),
    ],
)
def test_what_does_not_go_together_is_told(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(**changes)


@pytest.mark.parametrize(
    ("g", "said"),
    [
        ("1/(λ-1)", r"g\(1\) is inf"),
        ("sqrt(λ-1)", r"is nan; wanted a finite number"),
        ("own_functions:share", "depends on the others"),
        ("own_functions:total", "wanted a tensor"),
        ("own_functions:broken", "fails with TypeError"),
        ("own_functions:absent", "MODULE:FUNCTION to import"),
        ("no_such_module:f", "MODULE:FUNCTION to import"),
    ],
)
def test_a_transformation_is_tried_before_the_run(g: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_functions")
    module.share, module.total = (lambda x: x / x.sum()), (lambda x: float(x.sum()))  # type: ignore[attr-defined]
    module.broken, module.root = (lambda: 1), (lambda x: x**-0.5)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_functions", module)
    with pytest.raises(UserError, match=said):
        loss_of(settings(transform=g))
    views = [z.detach() for z in views_of(16, 40, 2)]
    found, expected = (loss_of(settings(**a))(views, 0) for a in (
        {"transform": "own_functions:root"}, {"power": 0.5})
    )  # fmt: skip
    assert found == expected


def test_only_a_command_names_a_module(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    words = ["--recipe", str(recipe), "--data-dir", "d", "--output", "o"]
    recipe.write_text("transform: 1/(λ+0.1)^0.5\n")
    assert parse_recipe(words).transform == "1/(λ+0.1)^0.5"
    recipe.write_text("transform: own.module:g\n")
    with pytest.raises(UserError, match=r"if you trust it, give --transform own\.module:g yourself"):
        parse_recipe(words)
    assert parse_recipe([*words, "--transform", "own.module:g"]).transform == "own.module:g"


def test_embeddings_that_are_not_finite_end_the_run_in_one_line() -> None:
    views = [torch.full((16, 8), torch.nan), torch.zeros(16, 8)]
    for changes in ({"objective": "mmcr"}, {"power": 0.5}):
        with pytest.raises(RunFailed, match=r"cannot be computed at step 3: .*not finite"):
            loss_of(settings(**changes))(views, 3)


def test_another_objective_trains_and_an_older_run_is_known_again(cifar_folder: Path, tmp_path: Path) -> None:
    """A run from before there was a choice goes on; one with another objective is refused."""
    output = tmp_path / "run"
    small = {"view_sizes": [12, 12], "batch_global": 320, "epochs": 1}
    train(tiny(cifar_folder, output, objective="sigreg", **small), CPU)
    last = read_jsonl(output / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(last["alignment"] + last["penalty"]) and "trace" not in last
    assert last["rankme"] > 1 and "loss_minus_floor" not in last
    with pytest.raises(UserError, match="objective: sigreg there, mmcr now"):
        train(tiny(cifar_folder, output, objective="mmcr", **small), CPU)
    state = load_checkpoint(output / "checkpoint.pt")
    for name in ("objective", "transform"):
        del state["config"][name]
    torch.save(state, output / "checkpoint.pt")
    train(tiny(cifar_folder, output, **small), CPU)  # finished: nothing to do
