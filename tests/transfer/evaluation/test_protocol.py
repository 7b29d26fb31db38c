"""Protocols: every file fits its evaluator, the hash follows the values, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from transfer.evaluation.protocol import all_protocols, as_markdown, load_protocol, main
from transfer.evaluators.knn import KnnProtocol
from transfer.evaluators.linear_protocol import LinearProtocol
from transfer.evaluators.semisup import SemisupProtocol

CLASSES = {"knn": KnnProtocol, "linear": LinearProtocol, "semisup": SemisupProtocol}
TEXT = "task: knn\ntitle: t\nsource: s\nvalues:\n  ks: [3]\n  temperature: 1e-1\n"


@pytest.mark.parametrize("protocol", all_protocols(), ids=str)
def test_every_file_fits_its_evaluator(protocol) -> None:
    assert protocol.settings(CLASSES[protocol.task]) is not None
    assert protocol.title and protocol.source
    if protocol.values.get("augmentation") is False:
        assert protocol.title.startswith("No augmentation")


def test_published_values() -> None:
    # Global batch b: 0.4 b / 256 at b = 256; SimSiam 0.1 * 4096 / 256 = 1.6; 13 rates of DINOv2, times 4.
    def linear(name):
        return load_protocol(name, "linear").settings(LinearProtocol)

    assert linear("intl_linear@1").rates == [0.4]
    assert linear("moco_linear@1").rates == [30]
    assert linear("simsiam_linear@1").rates == pytest.approx([1.6])
    assert linear("dinov2_sweep@1").rates == pytest.approx(
        [4 * r for r in linear("dinov2_sweep@1").learning_rates]
    )
    assert len(linear("dinov2_sweep@1").rates) == 13 and linear("dinov2_sweep@1").choose_on == "held-out"
    wider = linear("dinov2_sweep@2")
    assert wider.features == ("layer4", "layer3+layer4") and wider.grid_size == 26
    assert wider.rates == linear("dinov2_sweep@1").rates and linear("dinov2_sweep@1").features == ("layer4",)
    assert linear("swav_linear@1").std[0] == 0.228
    assert linear("logreg@1").costs[0] == 1e-6 and linear("logreg@1").costs[-1] == 1e5


def test_the_hash_follows_the_values_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine@2.yaml"
    path.write_text(TEXT)
    mine = load_protocol(str(path))
    assert (mine.name, mine.version) == ("mine", 2)
    assert mine.settings(KnnProtocol).temperature == 0.1
    path.write_text(TEXT.replace("title: t", "title: other"))
    assert load_protocol(str(path)).hash == mine.hash
    path.write_text(TEXT.replace("[3]", "[4]"))
    assert load_protocol(str(path)).hash != mine.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("ks:", "kss:"), "unknown value 'kss'"),
        (TEXT.replace("[3]", "three"), "ks: 'three'"),
        (TEXT.replace("  ks: [3]\n", ""), "ks missing"),
        (TEXT.replace("source: s\n", ""), "wanted exactly"),
        (TEXT.replace("task: knn", "task: guess"), "task 'guess'"),
        ("a: [", "not YAML"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine@1.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", "\\[")):
        load_protocol(str(path)).settings(KnnProtocol)


def test_unknown_and_misplaced_names_list_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"did you mean solo_knn@1.*dino_knn@1"):
        load_protocol("solo_knn", "knn")
    with pytest.raises(UserError, match="is for linear; for knn"):
        load_protocol("moco_linear@1", "knn")
    with pytest.raises(UserError, match="held_out_percent"):
        LinearProtocolFile = load_protocol("dinov2_sweep@1")
        values = dict(LinearProtocolFile.values) | {"held_out_percent": 0}
        type(LinearProtocolFile)(
            name="x", version=1, task="linear", title="", source="", values=values
        ).settings(LinearProtocol)
    assert main(["solo_knn@1"]) == 0 and "temperature: 0.07" in capsys.readouterr().out
    assert all(f"`{p}`" in as_markdown() for p in all_protocols())
