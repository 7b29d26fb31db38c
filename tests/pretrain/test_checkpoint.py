"""Checkpoints: whole after any failure, safe to read, copies that later steps cannot change."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoint import (
    CheckpointWriter,
    NotSaved,
    load_checkpoint,
    save_backbone,
    save_checkpoint,
    to_host,
)
from pretrain.common.errors import UserError
from pretrain.common.files import remove_leftovers
from tests.helpers.damage import spoilt


def test_state_comes_back_as_it_went(tmp_path: Path) -> None:
    state = {"step": 3, "model": {"w": torch.randn(2, 3)}, "ema": None, "list": [1, 2.5, "x", torch.ones(2)]}
    save_checkpoint(tmp_path / "c.pt", state)
    back = load_checkpoint(tmp_path / "c.pt")
    assert back["step"] == 3 and torch.equal(back["model"]["w"], state["model"]["w"]) and back["ema"] is None
    assert os.listdir(tmp_path) == ["c.pt"]


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/should-not-exist",)


def test_other_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for content in (b"", b"not a checkpoint", pickle.dumps(_Evil())):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1, "model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not Path("/tmp/should-not-exist").exists()


def test_a_failing_write_keeps_the_earlier_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.pt"
    writer = CheckpointWriter(path)
    writer.save({"step": 1})
    writer.wait(must_be_saved=True)
    broken = {"step": 2, "model": lambda: None}  # cannot be pickled: fails half-way through writing

    with pytest.raises((NotSaved, AttributeError, pickle.PicklingError)):
        save_checkpoint(path, broken)
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["c.pt"]


def test_a_missing_disk_is_logged_and_raised_only_when_it_must_be_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(tmp_path / "file" / "c.pt")
    writer.save({"step": 1})
    writer.wait()
    assert "checkpoint not saved" in caplog.text and "training goes on" in caplog.text
    writer.save({"step": 2})
    with pytest.raises(NotSaved, match="there is none before it"):
        writer.wait(must_be_saved=True)


def test_half_a_tensor_zeroed_on_disk_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"step": 1, "model": {"w": torch.rand(1000)}})
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 1
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        (tensor,) = (name for name in archive.namelist() if name.endswith("data/0"))
    with pytest.raises(UserError, match=r"c\.pt: damaged, data/0 has other bytes than were written"):
        load_checkpoint(spoilt(tmp_path / "c.pt", tensor))


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    w = torch.zeros(1_000_000)
    writer = CheckpointWriter(tmp_path / "c.pt")
    writer.save({"model": {"w": w}}, also=tmp_path / "copy.pt")
    w.fill_(1)  # the next step, while the thread writes
    writer.wait(must_be_saved=True)
    for name in ("c.pt", "copy.pt"):
        assert load_checkpoint(tmp_path / name)["model"]["w"].max() == 0
    assert to_host({"t": (w,)})["t"][0].data_ptr() != w.data_ptr()


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint.pt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_backbone_file_has_string_metadata_and_readable_permissions(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    tensors = {"conv1.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)}
    save_backbone(path, tensors, {"mean": [0.5, 0.25], "zero_init_last": False, "image_size": 32})
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("conv1.weight"), tensors["conv1.weight"])
        assert file.metadata() == {
            "format": "intl-bench/1", "mean": "0.5,0.25", "zero_init_last": "false", "image_size": "32",
        }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _save_small(path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    save_backbone(path, tensors, {k: f'λ\n"{k}\\' for k in "qwertyuiop"})


def test_the_same_backbone_is_the_same_file_in_every_process(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    _save_small(files[0])
    imports = "import sys, torch; from pathlib import Path; from pretrain.checkpoint import save_backbone\n"
    code = f"{imports}{inspect.getsource(_save_small)}_save_small(Path(sys.argv[1]))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # sets are in another order there
    env = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", code, str(files[1])], env=env, check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "pt") as file:
        assert list(file.keys()) == ["a", "b"] and torch.equal(file.get_tensor("b"), torch.ones(3))
        assert file.metadata()["q"] == 'λ\n"q\\' and len(file.metadata()) == 11


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
