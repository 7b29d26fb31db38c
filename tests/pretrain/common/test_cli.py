"""The command-line foundation as a user meets it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.common.cli import log_level, parse_settings, run, save_settings
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.progress import Progress
from pretrain.common.signals import Stopped
from pretrain.settings import parse_recipe


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


def test_the_settings_are_printed_as_a_file_that_repeats_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_small("--side-px", "7", "--print-config")
    assert ended.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_small("--config", str(tmp_path / "printed.yaml")) == Small(side_px=7)


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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"LOG_LEVEL": "foo"}, "LOG_LEVEL=foo: wanted DEBUG, INFO,"),
        ({"RANK": "x"}, "RANK=x: wanted a whole number; a launcher"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: wanted a whole number"),
        ({"WORLD_SIZE": "2\u00b2"}, "wanted a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: wanted"),
        ({"WORLD_SIZE": "9" * 5000}, "wanted a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 WORLD_SIZE=0: wanted a rank below"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 WORLD_SIZE=2: wanted a rank below"),
        ({"RANK": "1"}, "RANK=1 WORLD_SIZE=None"),
        ({"LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE=1.5"),
        ({"SLURM_CPUS_ON_NODE": "many"}, "SLURM_CPUS_ON_NODE=many"),
    ],
)
def test_an_odd_environment_is_one_line(
    said: dict[str, str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert run(lambda _: pytest.fail("was started"), []) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_levels_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, level in (("debug", 10), ("WARNING", 30), ("15", 15), ("", 20)):
        monkeypatch.setenv("LOG_LEVEL", said)
        assert log_level() == level


def test_names_that_no_file_system_takes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("x" * 300, "File name too long"), ("a\0b", "null byte"), ("file/below", "Not a dir")):
        (tmp_path / "file").write_text("")
        assert run(lambda _, name=name: (tmp_path / name).write_text("") and None, []) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1 and len(told) < 250


def test_a_full_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def main(_: list[str]) -> None:
        said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of "
        raise torch.OutOfMemoryError(f"{said}which 1.10 GiB is free. Process 7 has 78.00 GiB memory in use.")

    assert run(main, []) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "(CUDA out of memory. Tried to allocate 2.00 GiB); a smaller" in said


def test_a_long_mistake_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> None:
        raise UserError(f"--name {'x' * 100_000}: wanted less")

    assert run(main, []) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --name xx") and " [...] x" in told and told.endswith(": wanted less\n")
    assert len(told) < 4100


def test_a_choice_of_values_reads_well() -> None:
    with pytest.raises(
        UserError, match=r"^--precision half: wanted auto, float32, tf32, bfloat16 or float16 "
    ):
        parse_recipe(["--data-dir", "d", "--output", "o", "--precision", "half"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", "64"], "did you mean --batch-global?"),
        (["--view-sizes", "wide"], "^--view-sizes wide: wanted a list of whole numbers, such as "),
        (["--epochs", "ten"], "^--epochs ten: wanted a whole number "),
        (["--ema", "maybe"], "^--ema maybe: wanted true or false "),
        (["--hepl"], r"^unrecognized arguments: --hepl \("),  # --help is no answer to a wrong option
    ],
)
def test_a_mistake_is_told_in_the_users_words(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_recipe(["--data-dir", "d", "--output", "o", *words])


def test_an_option_of_an_earlier_version_in_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data_dir: d\noutput: o\ncompile: false\n")
    with pytest.raises(UserError, match="'compile' is not accepted in a file; --step compiled has taken"):
        parse_recipe(["--recipe", str(file)])


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
