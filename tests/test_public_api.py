"""The names that notebooks and other training loops import, and the example that uses them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretrain
import transfer
from tests.helpers.ranks import start_command, wait_ranks

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


@pytest.mark.commands
def test_intl_trains_a_foreign_encoder_on_two_ranks(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = ROOT / "docs" / "examples" / "intl_in_your_loop.py"
    for folder in sorted((cifar_folder / "train").iterdir())[:2]:
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:16]:
            (tmp_path / "images" / folder.name / file.name).symlink_to(file)
    words = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "encoder.pt")]
    words += ["--arch", "test_vit", "--size", "160", "--features", "64", "--batch", "32", "--epochs", "1"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the example is a script
    said = wait_ranks(start_command(str(example), *words), 0)
    losses = [line.split("loss ")[1].split(",")[0] for line in said]
    assert losses[0] == losses[1]  # the loss of the joined batch, on both
    backbone = importlib.import_module("timm").create_model("test_vit", num_classes=0)
    backbone.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))


class TinyNet(torch.nn.Module):
    """A network that no file was written of: two convolutions and a mean over the map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 24, 3, 2), torch.nn.ReLU()
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean((2, 3))


def test_a_module_is_judged_as_its_features_are(cifar_folder: Path, tmp_path: Path) -> None:
    network = TinyNet()
    train, test = (transfer.open_dataset("cifar10", cifar_folder, split) for split in ("train", "test"))
    bank, queries = (transfer.extract_features(network, part, precision="float32") for part in (train, test))
    pixels = torch.from_numpy(np.stack([np.array(test.image(i)) for i in range(8)])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        plain = network((pixels / 255 - mean) / std)
    torch.testing.assert_close(torch.from_numpy(queries[:8]), plain, rtol=1e-4, atol=1e-5)

    found = transfer.knn_evaluate(bank, train.labels_N, queries, test.labels_N, ks=20)
    assert found == transfer.knn_evaluate(bank, train.labels_N, queries, test.labels_N, ks=[20])
    arguments = {"dataset": "cifar10", "data_dir": cifar_folder, "precision": "float32", "label": "tiny"}
    (result,) = transfer.evaluate(network, "knn", protocol="solo_knn@1", output=tmp_path, **arguments)
    assert result.metrics["top1_k20"] == pytest.approx(found["top1_k20"], abs=1e-4)
    assert result.weights["format"] == "module" and result.arch == "TinyNet"
    (again,) = transfer.evaluate(network, "knn", protocol="solo_knn@1", output=tmp_path, **arguments)
    assert again == result and transfer.read_results(tmp_path) == [result]  # read, not run once more

    probed = transfer.linear_probe(bank, train.labels_N, queries, test.labels_N)
    by_command = transfer.evaluate(network, "linear", protocol="cached_linear@1", **arguments)
    last = next(r for r in by_command if r.selection != "best" and r.epoch == 12)
    assert probed["top1"] == pytest.approx(last.metrics["top1"], abs=1e-4)
    tensors = (torch.as_tensor(x) for x in (train.labels_N, queries, test.labels_N))
    learnt = torch.from_numpy(bank).requires_grad_()  # as a network gives them
    assert probed == transfer.linear_probe(learnt, *tensors)
    with pytest.raises(ValueError, match="no option labels"):
        transfer.evaluate(network, "knn", protocol="solo_knn@1", labels="x", **arguments)


def test_console_scripts_are_immune_to_files_of_our_names(tmp_path: Path) -> None:
    for name in ("pretrain", "transfer", "slurm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the current folder was run')")
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    control = subprocess.run([sys.executable, "-m", "pretrain"], stderr=subprocess.PIPE, **options)
    assert "the file of the current folder was run" in control.stderr
    for name in ("intl-pretrain", "intl-transfer", "intl-slurm"):
        script = Path(sysconfig.get_path("scripts")) / name
        said = subprocess.run([script, "--version"], stdout=subprocess.PIPE, check=True, **options).stdout
        assert said == f"intl-bench {pretrain.__version__}\n"
