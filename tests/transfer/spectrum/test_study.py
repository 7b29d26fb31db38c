"""The spectrum study as a user starts it, on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl
from transfer.options.commands import StudySettings
from transfer.spectrum import study
from transfer.spectrum.study_pictures import _evenness, by_instance, statement


def test_study_runs_goes_on_and_draws(cifar_folder: Path, tmp_path: Path) -> None:
    argv = [
        "--dataset", "imagefolder", "--data-dir", str(cifar_folder), "--output", str(tmp_path),
        "--steps", "2", "--seeds", "2", "--batch", "16", "--features", "24",
        "--powers", "[0.25]", "--iterations", "[4]", "--transforms", '["min(λ^-0.5, 10)"]',
        "--objectives", "[vicreg]", "--bank", "60", "--queries", "20",
    ]  # fmt: skip
    study.main(argv)
    runs = read_jsonl(tmp_path / "runs.jsonl")
    names = [
        "λ^-0.25", "hard whitening", "min(λ^-0.5, 10)", "IterNorm T=4", "INTL", "VICReg", "random control",
        "raw pixels",
    ]  # fmt: skip
    assert [(r["instance"], r["seed"]) for r in runs] == [(name, seed) for seed in (0, 1) for name in names]
    pixels = [r for r in runs if r["kind"] == "pixels"]
    assert [r["log"] for r in pixels] == [[], []] and pixels[0]["knn_top1"] == pixels[1]["knn_top1"]
    control = next(r for r in runs if r["kind"] == "control")
    # nothing is trained, and another batch has another spectrum
    assert control["log"][0]["loss"] != control["log"][-1]["loss"]
    assert all(r["spectrum"]["rankme"] > 1 for r in runs)
    for run in (r for r in runs if r["kind"] not in ("pixels", "objective")):
        assert run["diverged"] is None and 0 <= run["knn_top1"] <= 100
        assert len(run["log"][0]["eigenvalues"]) == 16
        assert sum(run["log"][0]["eigenvalues"]) == pytest.approx(1)
        assert (run["floor"] > 0) == (run["kind"] == "intl") and run["log"][0]["loss"] > run["floor"]
        if run["kind"] == "hard":  # all eigenvalues 1
            assert run["log"][-1]["transformed"] == pytest.approx([1.0] * 16, abs=1e-4)
    # the same weights and batches: what is measured before the first step differs in nothing but the loss
    assert runs[0]["log"][0]["eigenvalues"] == runs[5]["log"][0]["eigenvalues"]
    assert runs[0]["log"][0]["eigenvalues"] != runs[8]["log"][0]["eigenvalues"]
    text = (tmp_path / "study.md").read_text()
    assert "| VICReg | 2 |" in text and "| raw pixels | 2 | 0 | – | – | – | – | – |" in text
    assert "Kendall's τ over the ways to train" in text and "| rankme | 6 |" in text
    for picture in ("spectra.svg", "curves.svg", "knn.svg"):
        assert "<svg" in (tmp_path / picture).read_text()
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]))  # the last run was cut off
    study.main(argv)
    again = read_jsonl(tmp_path / "runs.jsonl")
    assert again[:-1] == runs[:-1] and again[-1]["knn_top1"] == runs[-1]["knn_top1"]
    with pytest.raises(UserError, match="other settings"):
        study.main([*argv, "--lr", "0.5"])


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"batch": 8}, {"seeds": 0}, {"iterations": (0,)}, {"transforms": ("λ.sum()",)}):
        with pytest.raises(ValueError, match="λ.sum" if "transforms" in wrong else next(iter(wrong))):
            StudySettings(data_dir=".", output=".", **wrong)


def test_a_run_that_diverges_at_once_is_told(cifar_folder: Path, tmp_path: Path) -> None:
    """λ^-60 leaves float32's range before anything is logged; the other runs are done, and no run again."""
    argv = [
        "--dataset", "imagefolder", "--data-dir", str(cifar_folder), "--output", str(tmp_path),
        "--steps", "2", "--seeds", "1", "--batch", "16", "--features", "12", "--whitening", "batch",
        "--powers", "[60]", "--iterations", "[4]", "--bank", "60", "--queries", "20", "--transforms", "[]",
        "--objectives", "[]",
    ]  # fmt: skip
    for _ in range(2):
        study.main(argv)
        runs = {r["instance"]: r for r in read_jsonl(tmp_path / "runs.jsonl")}
        assert list(runs) == [
            "λ^-60", "hard whitening", "IterNorm T=4", "INTL", "random control", "raw pixels"
        ]  # fmt: skip
        assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6
        lost = runs["λ^-60"]
        assert lost["log"] == [] and lost["knn_top1"] is None and lost["diverged"] == lost["verdict"]
        text = (tmp_path / "study.md").read_text()
        assert "| λ^-60 | 1 | 1 | – | – | – | – | – | – |" in text
        assert "- λ^-60, seed 0: step 1: " in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| hard")]
    assert float(rows[0][7]) == pytest.approx(1, abs=1e-4)  # evenness after: all 12 eigenvalues are 1


@pytest.mark.parametrize(
    "whitening, batch, features, wanted",
    [("channel", 16, 24, 16), ("channel", 16, 12, 11), ("batch", 16, 24, 15), ("batch", 16, 12, 12)],
)
def test_evenness_is_never_beyond_one(whitening: str, batch: int, features: int, wanted: int) -> None:
    """Centring takes one from the averaged side; hard whitening makes all that is left equal."""
    settings = StudySettings(
        data_dir=".", output=".", whitening=whitening, batch=batch, features=features  # type: ignore[arg-type]
    )  # fmt: skip
    assert study.possible_rank(settings, features) == wanted
    hard = next(i for i in study.instances(settings) if i.kind == "hard")
    z = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))
    spectra = study._spectra(z, hard, settings)
    run = {"possible_rank": wanted}
    assert _evenness(spectra["transformed"], run) == pytest.approx(1, abs=1e-9)
    assert 0.3 < _evenness(spectra["eigenvalues"], run) < 1


def test_statement_tells_where_the_paper_differs() -> None:
    def run(name: str, kind: str, verdict: str | None, after: list[float], steps: int = 600) -> dict:
        end = {
            "step": steps,
            "loss": 1.0,
            "condition_number": 2.0,
            "rankme": 2.0,
            "eigenvalues": [1.0, 0.0],
            "transformed": after,
        }
        return {
            "instance": name, "kind": kind, "seed": 0, "verdict": verdict, "diverged": None, "knn_top1": 50.0,
            "possible_rank": 2, "log": [end], "floor": 0.25,
        }  # fmt: skip

    lost = "full collapse"
    runs = [
        run("none", "power", lost, [1.0, 0.0]), run("λ^-0.4", "power", lost, [1.0, 1.0]),
        run("hard whitening", "hard", lost, [1.0, 1.0]), run("λ^-0.6", "power", None, [1.0, 1.0]),
        run("λ^-1", "power", lost, [1.0, 1.0]), run("IterNorm T=4", "iternorm", lost, [3.0, 1.0]),
        run("INTL", "intl", None, [1.0, 1.0]),
    ]  # fmt: skip
    text = statement(by_instance(runs), title="x")
    assert "| hard whitening | 1 | 1 | 0.75 | 2 |" in text
    # a power between has no verdict
    assert "Here it differs: hard whitening did not avoid collapse.\n" in text
    assert "without a verdict: λ^-0.4 did not avoid collapse; λ^-0.6 avoided collapse.\n" in text
    # exp(H(¾, ¼)) / 2 = 0.877; one eigenvalue of two is 0.5
    assert "INTL 0.500 and 1.000; IterNorm T=4 0.500 and 0.877 (collapsed or diverged)." in text
    assert "After it INTL's is more even than IterNorm's.\n" in text and "agrees" not in text
    far = statement(by_instance([runs[5], run("INTL", "intl", None, [1.0, 0.01])]), title="x")
    assert "INTL's is no more even than IterNorm's, and far from equal eigenvalues after 600 steps." in far
    short = statement(by_instance([run("hard whitening", "hard", None, [1.0, 1.0], steps=20)]), title="x")
    assert "Too short to judge: after 20 steps" in short and "voided collapse" not in short


def test_an_untrained_network_sees_the_whole_image() -> None:
    """Blocks whose last BatchNorm begins at zero let only 1x1 convolutions through: one corner."""
    torch.manual_seed(0)
    backbone = study._encoder(16).backbone.eval()
    x = torch.rand(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 24:, 24:] = 1 - x[..., 24:, 24:]
    with torch.no_grad():
        assert (backbone(changed) - backbone(x)).abs().max() > 1e-3 * backbone(x).abs().max()
