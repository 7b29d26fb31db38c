"""A machine without detectron2: what needs it says so in one line, before its work; the rest runs."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from slurm.steps import checks
from slurm.steps.suite import Suite

BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
TRAIN_NET = """
import runpy
runpy.run_module("transfer.train_net", run_name="__main__", alter_sys=True)
"""


def train_net_without_detectron2(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + TRAIN_NET, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def transfer_without_detectron2(commands: list[str]) -> None:
    """Imported anew, where PyTorch alone is there already."""
    logging.root.handlers.clear()  # pytest's; the command sets its own
    for name in [n for n in sys.modules if n.partition(".")[0] in ("detectron2", "transfer")]:
        del sys.modules[name]
    exec(BLOCK, {})
    main = importlib.import_module("transfer.__main__").main
    for words in commands:
        print("exit code", main(words.split()), flush=True)


def test_train_net_says_what_is_missing(tmp_path: Path) -> None:
    words = ["--config-file", "scenes_R18_FPN", "--random-init", "OUTPUT_DIR", str(tmp_path / "out")]
    done = train_net_without_detectron2(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: detectron2 is missing") and "make env" in done.stderr
    assert "git+https://github.com/facebookresearch/detectron2.git" in done.stderr
    assert not (tmp_path / "out").exists()
    helped = train_net_without_detectron2("--help")
    assert helped.returncode == 0 and "--config-file" in helped.stdout


def test_convert_and_plan_say_so_and_converting_unproved_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
    convert = f"convert --weights {tmp_path}/w.pth --output {tmp_path}/w.pkl"
    plan = "plan --config-file coco_R50_C4_2x --num-gpus 4"
    back = f"convert --reverse --weights {tmp_path}/w.pkl --output {tmp_path}/w.safetensors"
    commands = [convert, plan, f"{convert} --no-verify", back, f"{back} --no-verify"]
    child = multiprocessing.get_context("fork").Process(target=transfer_without_detectron2, args=(commands,))
    child.start()
    child.join(120)
    out, err = capfd.readouterr()
    assert child.exitcode == 0, err
    codes = [x for x in out.splitlines() if x.startswith("exit code")]
    assert codes == ["exit code 2", "exit code 2", "exit code 0", "exit code 2", "exit code 0"], err
    errors = [x for x in err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 3 and all("detectron2 is missing" in e for e in errors)
    assert "--no-verify" in errors[0] and "--no-verify" not in errors[1]
    assert "Traceback" not in err and (tmp_path / "w.safetensors").exists()


def test_a_suite_with_detection_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    asked = Suite(output=str(tmp_path), weights=["w.pth"], tasks=["coco_c4_2x"])
    (problem,) = checks._detection(asked, {})
    assert problem.startswith("--tasks coco_c4_2x: detectron2 is missing")
