"""`transfer spectrum` as a user starts it, on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pretrain.checkpoint import save_backbone
from pretrain.common.errors import UserError
from pretrain.network.model import build_backbone
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Result, check, read
from transfer.evaluators import knn
from transfer.report import command
from transfer.spectrum import diagnosis
from transfer.spectrum.diagnosis import read_spectra
from transfer.spectrum.rank_metrics import rank_metrics


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small networks as pretraining writes them."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = build_backbone("resnet18", stem="cifar")
        path = tmp_path_factory.mktemp(f"run{seed}") / "backbone.safetensors"
        said = {"arch": "resnet18", "stem": "cifar", "stem_padding": 1, "branch": "online", "image_size": 16}
        network(torch.randn(8, 3, 16, 16))  # BatchNorm statistics of a sort
        save_backbone(path, network.state_dict(), {**said, "step": 10 * seed})
        found.append(str(path))
    return found


def _protocol(folder: Path, **other: int) -> str:
    values = dict(load_protocol("spectrum@1").values)
    values |= {
        "images": 64,
        "sizes": [40],
        "view_images": 16,
        "views": 2,
        "repeats": 2,
        "clusters": 4,
    } | other
    path = folder / "short@1.yaml"
    path.write_text(yaml.safe_dump({"task": "spectrum", "title": "t", "source": "s", "values": values}))
    return str(path)


def test_checkpoints_are_diagnosed_once(
    weights: list[str], cifar_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [
        "--weights", *weights, "--protocol", _protocol(tmp_path), "--dataset", "imagefolder",
        "--data-dir", str(cifar_folder), "--output", str(tmp_path / "out"), "--precision", "float32",
        "--random-init", "true",
    ]  # fmt: skip
    diagnosis.main(argv)
    results = read(tmp_path / "out")
    assert [r.weights["path"] for r in results] == weights and {r.n for r in results} == {64}
    for r in results:
        assert r.task == "spectrum" and r.seed is None and not r.warnings
        assert set(r.metrics) == {
            "rankme", "decay", "stable_rank", "entropy_rank", "condition_number", "largest_share",
            "uniformity", "cluster_learnability", "intrinsic_dimension", "clid", "nc1", "nc2_norms",
            "nc2_angles", "alignment", "lidar",
        }  # fmt: skip
        for name, (low, high) in r.settings["intervals"].items():
            assert low <= r.metrics[name] <= high
    spectra = [*read_spectra(tmp_path / "out").values()]
    assert [s["step"] for s in spectra] == [0, 10] and list(spectra[0]["layers"]) == [
        "layer1", "layer2", "layer3", "layer4",
    ]  # fmt: skip
    assert list(spectra[0]["by_images"]) == ["40", "64"]
    # the figures are those of the features that the cache holds
    (cached,) = (np.load(f) for f in [sorted((tmp_path / "out/features").glob("*/features.npy"))[0]])
    ours = [rank_metrics(cached[:, -512:])[k] for k in ("rankme", "stable_rank")]
    assert any(
        ours == pytest.approx([r.metrics["rankme"], r.metrics["stable_rank"]], abs=1e-3) for r in results
    )
    for name in ("spectra", "layers", "images"):
        assert "<svg" in (tmp_path / f"out/pictures/{name}.svg").read_text()
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["weights"] == weights
    capsys.readouterr()
    diagnosis.main(argv)
    assert capsys.readouterr().out.count("finished already") == 2 and len(read(tmp_path / "out")) == 2


def test_a_report_tells_the_features_of_layers_from_those_of_knn(
    weights: list[str], cifar_folder: Path, tmp_path: Path
) -> None:
    """Both are in one cache, of the same weights and images."""
    out = tmp_path / "out"
    shared = [
        "--weights", weights[0], "--dataset", "imagefolder", "--data-dir", str(cifar_folder), "--output",
        str(out), "--precision", "float32", "--random-init", "true",
    ]  # fmt: skip
    diagnosis.main([*shared, "--protocol", _protocol(tmp_path, images=100_000), "--no-views"])
    (of_layers,) = (out / "features").glob("*/meta.json")
    of_layers.parent.rename(out / "features" / "0")  # found first
    knn.main([*shared, "--protocol", "solo_knn@2"])
    command.main([str(out), "--output", str(tmp_path / "report")])
    assert "of the 6 nearest to each of" in (tmp_path / "report/index.html").read_text()


def test_raw_pixels_have_no_layers(cifar_folder: Path, tmp_path: Path) -> None:
    diagnosis.main([
        "--weights", "raw-pixels", "--protocol", _protocol(tmp_path), "--dataset", "imagefolder",
        "--no-views", "--image-size", "16", "--data-dir", str(cifar_folder),
        "--output", str(tmp_path / "out"),
    ])  # fmt: skip
    (result,) = read(tmp_path / "out")
    assert result.settings["features"] == 3 * 16 * 16 and "lidar" not in result.metrics
    assert not (tmp_path / "out/pictures/layers.svg").exists()


def test_wrong_use_is_told(tmp_path: Path, cifar_folder: Path) -> None:
    base = ["--dataset", "imagefolder", "--data-dir", str(cifar_folder), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--label a: names one row, and --weights names 2"):
        diagnosis.main([*base, "--weights", "x", "y", "--label", "a"])
    with pytest.raises(UserError, match="is for knn; for spectrum"):
        diagnosis.main([*base, "--weights", "raw-pixels", "--protocol", "solo_knn@2"])
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_only_a_spectrum_has_figures_beyond_percent() -> None:
    check({"task": "spectrum", "metrics": {"rankme": 900.0, "uniformity": -3.0}})
    with pytest.raises(ValueError, match="no percentage"):
        check({"task": "knn", "metrics": {"top1": 900.0}})
    assert "spectrum" in str(Result.__annotations__["task"])
