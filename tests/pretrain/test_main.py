"""`python -m pretrain` as a user meets it, and the recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.input_pipeline import views_of
from pretrain.settings import RECIPES, parse_recipe


def pretrain(*argv: str) -> int:
    """The exit code of the command, in this process."""
    from pretrain.__main__ import main

    return main(list(argv))


def test_help_and_the_command_as_typed() -> None:
    done = subprocess.run([sys.executable, "-m", "pretrain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in (
        "--data-dir",
        "--view-sizes",
        "--ema-momentum",
        "imagenet_ep100_multicrop_ema",
        "exit codes",
    ):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--recipe", "nonsense"], "known names: cifar100_ep1000, cifar10_ep1000"),
        (["--data-dir", "DATA", "--dataset", "mnist"], "unknown data set 'mnist'"),
        (["--data-dir", "nowhere"], "nowhere: no such folder"),
        (["--data-dir", "DATA", "--arch", "resnet19"], "did you mean resnet18"),
        (["--data-dir", "DATA", "--view-sizes", "[32]"], "at least 2 views"),
        (["--data-dir", "DATA", "--batch-global", "100000"], "more than the 640 images"),
        (["--data-dir", "DATA", "--hook", "no.such:thing"], "MODULE:FUNCTION"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(
    argv: list[str], said: str, cifar_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(cifar_folder) if a == "DATA" else a for a in argv]
    code = pretrain(*(["--dataset", "cifar10"] if "--dataset" not in argv else []), *argv,
                    "--output", str(tmp_path / "run"))  # fmt: skip
    err = capsys.readouterr().err
    assert code == 2 and said in err and "Traceback" not in err and err.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_unknown_options_and_values_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--learning-rate", "1"), ("--epochs", "many"), ("--stem", "big")):
        assert pretrain("--data-dir", "x", "--output", "y", option, value) == 2
        err = capsys.readouterr().err
        assert option.strip("-") in err and "Traceback" not in err


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_each_recipe_parses_and_states_its_source(recipe: str) -> None:
    settings = parse_recipe(["--recipe", recipe, "--data-dir", "d", "--output", "o", "--epochs", "3"])
    assert settings.epochs == 3 and len(views_of(settings)) == len(settings.view_sizes)
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert text.startswith("#")
    if recipe.startswith("demo") or recipe.endswith("two_cores"):
        assert "# Not a published run." in text
    else:
        assert "# Published: " in text and "https://github.com/winci-ai/INTL" in text


def test_published_recipes_have_the_published_figures() -> None:
    def values(name: str) -> dict:
        return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())

    rates = {100: 0.5, 200: 0.4, 400: 0.4, 800: 0.3}
    for epochs, lr in rates.items():
        recipe = values(f"imagenet_ep{epochs}_multicrop_ema")
        assert (recipe["epochs"], recipe["lr"], recipe["ema"]) == (epochs, lr, True)
        assert recipe["view_sizes"] == [224, 224, 192, 160, 128, 96] and recipe["batch_global"] == 256
    assert values("imagenet_ep800")["view_sizes"] == [224, 224] and not values("imagenet_ep800")["ema"]
    small = values("imagenet100_ep400")
    assert (small["batch_global"], small["projector_hidden"], small["projector_output"]) == (128, 4096, 8192)
    for name in ("cifar10_ep1000", "cifar100_ep1000"):
        cifar = values(name)
        assert (cifar["stem"], cifar["weight_decay"], cifar["decay_1d"]) == ("cifar", 1e-4, True)
        assert cifar["precision"] == "tf32" and cifar["blur_p"] == [0.0]
