"""`python -m pretrain` and the command-line foundation as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.common.cli import parse_settings, run, save_settings
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.progress import Progress
from pretrain.common.signals import Stopped
from pretrain.settings import RECIPES, parse_recipe
from pretrain.train import views_of


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
        assert cifar["precision"] == "float32" and cifar["blur_p"] == [0.0]


def test_profile_accounts_for_a_step(cifar_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.profile import PARTS, main

    main([
        "--steps", "1", "--dataset", "cifar10", "--data-dir", str(cifar_folder), "--arch", "resnet18",
        "--view-sizes", "[32, 32]", "--projector-hidden", "64", "--projector-output", "64",
        "--batch-global", "16",
        "--workers", "0",
    ])  # fmt: skip
    out = capsys.readouterr().out
    shares = [float(line.split()[-2]) for line in out.splitlines() if line.startswith(PARTS)]
    assert len(shares) == len(PARTS) and sum(shares) == pytest.approx(100, abs=0.5)
    assert "worth changing first" in out
    # ResNet-18 has 1.8 G multiply-adds at 224 px, so (32 / 224)^2 of it here; 2 views, 3 passes, 16 images.
    flops = float(out.split("model: ")[1].split()[0])
    assert flops == pytest.approx(1.82 * (32 / 224) ** 2 * 2 * 2 * 3 * 16, rel=0.1)
    assert "colour and blur in the training process (--augment-on auto)\n" in out  # there are no workers


def test_profile_times_both_places_of_colour_and_blur(
    cifar_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import profile

    used = []
    views = profile.Views

    def noted(*args: Any, **options: Any) -> Any:
        used.append(options["finish_here"])
        return views(*args, **options)

    monkeypatch.setattr(profile, "Views", noted)
    monkeypatch.setattr(profile.torch.cuda, "is_available", lambda: False)
    tiny = [
        "--steps", "1", "--dataset", "cifar10", "--data-dir", str(cifar_folder), "--arch", "resnet18",
        "--view-sizes", "[16, 16]", "--projector-hidden", "64", "--projector-output", "64",
        "--batch-global", "16", "--workers", "1",
    ]  # fmt: skip
    profile.main(tiny)
    out = capsys.readouterr().out
    assert used[:2] == [True, False]  # without a GPU the workers' is the one chosen, and the table's
    assert "colour and blur in the workers (--augment-on auto)\n" in out
    assert re.search(r"with --augment-on device +[\d.]+ ms a step, [\d.]+ times as fast", out)
    tried = len(used)
    profile.main([*tiny, "--augment-on", "device"])
    out = capsys.readouterr().out
    assert not any(used[tried:]) and "with --augment-on" not in out


def test_profile_recommends_only_what_was_faster() -> None:
    from pretrain.profile import speedups

    seconds = {"data wait": 0.2, "transfer and augment": 0.0, "forward": 0.8}
    tried = {
        "--workers 4": {"data wait": 0.0, "forward": 0.4},  # forward cannot have gained: 1 - 0.2 is the least
        "--precision auto": {"data wait": 0.2, "forward": 0.3},
        "--augment-on device": {"data wait": 0.2, "forward": 1.0},
    }
    gains = speedups(seconds, tried)
    assert list(gains) == ["--precision auto", "--workers 4", "--augment-on device"]
    assert list(gains.values()) == pytest.approx([2.0, 1.25, 1 / 1.2])


def test_profile_tries_nothing_that_changes_the_method() -> None:
    from pretrain.profile import alternatives

    settings = parse_recipe(["--recipe", "cifar10_ep1000", "--data-dir", "d", "--output", "o"])
    for device in (torch.device("cpu"), torch.device("cuda")):
        for changed in alternatives(dataclasses.replace(settings, precision="float32"), device).values():
            same = {"workers", "augment_on", "precision", "compile", "jpeg_draft"}
            before, after = dataclasses.asdict(settings), dataclasses.asdict(changed)
            differ = {name for name in before if before[name] != after[name]}
            assert len(differ) == 1 and differ <= same


@dataclass(frozen=True, kw_only=True)
class Small:
    name: str = "x"
    """A name."""
    side_px: int = 3
    """A side."""

    def __post_init__(self) -> None:
        if self.side_px < 0:
            raise ValueError(f"side_px must not be negative, got {self.side_px}")


def parse_small(*argv: str) -> Small:
    return parse_settings(Small, argv, prog="p", description="d")


def test_files_then_options_and_back(tmp_path: Path) -> None:
    for name, content in (("a", "name: a\nside_px: 5\n"), ("b", "name: b\n")):
        (tmp_path / f"{name}.yaml").write_text(content)
    a, b = str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"
    assert parse_small("--config", a, b, "--side-px", "7") == Small(name="b", side_px=7)
    save_settings(Small(name="q", side_px=9), tmp_path / "used.yaml")
    assert parse_small("--config", str(tmp_path / "used.yaml")) == Small(name="q", side_px=9)
    with pytest.raises(UserError, match="must not be negative, got -1"):
        parse_small("--side-px", "-1")
    with pytest.raises(UserError, match="no such file"):
        parse_small("--config", "missing.yaml")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("mend it"), 2),
        (RunFailed("broken"), 1),
        (Stopped("stopped"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> None:
        raise error

    assert run(main, []) == code and "Traceback" not in capsys.readouterr().err
    assert run(lambda _: None, []) == 0 and run(lambda _: 3, []) == 3


def test_a_choice_of_values_reads_well() -> None:
    with pytest.raises(UserError, match="--precision: Expected one of auto, float32, bfloat16, float16"):
        parse_recipe(["--data-dir", "d", "--output", "o", "--precision", "half"])


def test_progress_lines_with_and_without_values(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(20, label="x", every_s=0) as bar:
        bar.update(6)
        bar.update(6, loss=0.5)
    assert re.fullmatch(
        r"x: 6/20 steps, \d+ s left\nx: 12/20 steps loss 0.5, \d+ s left\n", capsys.readouterr().err
    )


def test_progress_tells_other_processes(tmp_path: Path) -> None:
    with Progress(10, label="x", start=4, file=tmp_path / "progress.json") as bar:
        bar.update(3, loss=0.5)
        seen = json.loads((tmp_path / "progress.json").read_text())
        assert (seen["done"], seen["total"], seen["values"]) == (7, 10, {"loss": 0.5})
        assert seen["eta_s"] >= 0
        bar.update(3)
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 10


def test_progress_keeps_its_values_between_two_of_them(tmp_path: Path) -> None:
    with Progress(4, label="work", file=tmp_path / "p.json") as bar:
        bar.update(1, loss=0.5)
        bar.update(1, rate=2.0)
        bar.update(2)
    assert json.loads((tmp_path / "p.json").read_text())["values"] == {"loss": 0.5, "rate": 2.0}
