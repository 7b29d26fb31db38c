"""The names that notebooks and other training loops import, and the example that uses them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
import transfer
from tests.helpers.ranks import free_port

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", [pretrain, transfer])
def test_public_names_are_there_documented_and_typed(package) -> None:
    assert dir(package) == sorted(package.__all__) and len(package.__all__) > 5
    for name in package.__all__:
        found = getattr(package, name)
        assert found.__doc__ and found.__module__.startswith(("pretrain.", "transfer.")), name
    assert (Path(package.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_loads_no_library() -> None:
    code = "import sys, pretrain, transfer; print({'torch', 'numpy', 'timm', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_intl_trains_a_foreign_encoder_on_two_ranks(cifar_folder: Path, tmp_path: Path) -> None:
    example = ROOT / "docs" / "examples" / "intl_in_your_loop.py"
    for folder in sorted((cifar_folder / "train").iterdir())[:2]:
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:16]:
            (tmp_path / "images" / folder.name / file.name).symlink_to(file)
    words = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "encoder.pt")]
    words += ["--arch", "test_vit", "--size", "160", "--features", "64", "--batch", "32", "--epochs", "1"]
    port = free_port()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(example), *words], stdout=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    losses = [line.split("loss ")[1].split(",")[0] for line in said]
    assert losses[0] == losses[1]  # the loss of the joined batch, on both
    backbone = importlib.import_module("timm").create_model("test_vit", num_classes=0)
    backbone.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
