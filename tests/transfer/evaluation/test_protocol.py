"""Protocols: every file fits its evaluator, the hash follows the values, mistakes are named."""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np
import pytest

from pretrain.common.errors import UserError
from transfer.__main__ import main as transfer_main
from transfer.evaluation.pooled_features import stages_of
from transfer.evaluation.protocol import FOLDER, Protocol, all_protocols, as_markdown, load_protocol
from transfer.evaluators.epoch_order import epoch_batches
from transfer.evaluators.knn import KnnProtocol
from transfer.evaluators.linear_protocol import LinearProtocol
from transfer.evaluators.semisup import FineTuneProtocol
from transfer.spectrum.diagnosis import SpectrumProtocol

CLASSES = {
    "knn": KnnProtocol, "linear": LinearProtocol, "semisup": FineTuneProtocol, "spectrum": SpectrumProtocol,
}  # fmt: skip
TEXT = "task: knn\ntitle: t\nsource: s\nvalues:\n  ks: [3]\n  temperature: 1e-1\n"


@pytest.mark.parametrize("protocol", all_protocols(), ids=str)
def test_every_file_fits_its_evaluator(protocol) -> None:
    assert protocol.settings(CLASSES[protocol.task]) is not None
    assert protocol.title and protocol.source
    if protocol.values.get("augmentation") is False:
        assert protocol.title.startswith("No augmentation")


RELEASED = dict(
    line.split()
    for line in """
dino_vit_knn@1 6d0c5b3325b8
dinov2_vit_knn@1 4e2d2c7abbb9
dino_vit_linear@1 d9dfa3c01bc5
dino_vitb_linear@1 ca227d05abdb
dinov2_vit_linear@1 75cfb15f81b5
mocov3_vit_linear@1 2d7a46318a75
ijepa_linear@1 3ca48864cb46
mae_finetune@1 be5888052d7c
vicregl_linear@1 815687617999
mae_linear@1 a2cdd648cc31
msn_low_shot@1 0c6c164b826c
dino_knn@1 f75c319560a2
dino_knn@2 0ffb6b766880
intl_cifar_5nn@1 6573672138fc
intl_cifar_5nn@2 9b53f7770808
lightly_knn@1 fce65a2a92fa
lightly_knn@2 f6f229921ee5
solo_knn@1 9b0b8483d2cd
solo_knn@2 9fc22ba7dee1
solo_knn_online@1 2e77ecaf27f4
vissl_knn@1 5dd1e7244ed3
vissl_knn@2 c10e2b6050ec
barlow_linear@1 fbd1880e0415
barlow_linear@2 815687617999
cached_linear@1 c6b8e56d5b1d
dino_linear@1 14d80b475599
dino_linear@2 efc0429df635
dino_rn50_linear@1 f49cd9f6151f
dinov2_logreg@1 f516bf8f2328
dinov2_sweep@1 e0d2edd532e5
dinov2_sweep@2 d44c29299e27
dinov2_sweep_on_val@1 57104c8de87b
dinov2_sweep_on_val@2 f5825f15a374
intl_cifar_linear@1 8d7ca527e1a0
intl_cifar_linear@2 c709be73eb72
intl_ep800_linear@1 652795614827
intl_ep800_linear@2 8df48207bce9
intl_linear@1 48bc9bee53a7
intl_linear@2 e17303a64e3c
lightly_linear@1 4c8563c30005
lightly_linear@2 340ee91a7b57
logreg@1 1507264737d7
moco_linear@1 7cede7fd5414
moco_linear@2 eeecbe8040eb
mocov3_linear@1 8463769ca645
mocov3_linear@2 01d9d1fa23c0
simsiam_linear@1 701e6e438662
simsiam_linear@2 154eb6a98661
ssl_transfer_logreg@1 8390b2d12151
spectrum@1 b8740815d42a
svm_pooled@1 ed682fbd946a
svm_pooled_low_shot@1 eadba190def2
swav_linear@1 6608c2bf8e3c
swav_linear@2 3ef8e9470bfb
vicreg_linear@1 228097bcca5c
vicreg_linear@2 7478b2d82a44
voc07_svm@1 ed682fbd946a
voc07_svm@2 035047efbcdf
voc07_svm_low_shot@1 eadba190def2
voc07_svm_low_shot@2 960637a9e850
barlow_semisup@1 aea6f2871128
finetune@1 a3e848731b1d
intl_ep800_semisup_as_released@1 c407762922dc
intl_ep800_semisup_cosine@1 bbaf492f45a0
intl_semisup_as_released@1 fe587823bb37
intl_semisup_cosine@1 252db0036cf1
swav_semisup@1 8828bae59c98
vicreg_semisup@1 03453d1cdb91
""".strip().splitlines()
)
"""Every file that was ever released, with its hash; a correction is added as another version."""


def test_released_files_never_change() -> None:
    assert {str(p): p.hash for p in all_protocols()} == RELEASED


def test_a_published_figure_is_claimed_in_the_authors_precision() -> None:
    ours = {"cached_linear", "logreg", "finetune", "dinov2_sweep", "dinov2_sweep_on_val", "svm_pooled"}
    ours |= {"svm_pooled_low_shot", "voc07_svm", "voc07_svm_low_shot"}
    ours |= {"dinov2_vit_knn", "dinov2_vit_linear", "mae_linear"}  # theirs compute features in float16
    newest = {p.name: p for p in all_protocols()}
    for name, protocol in newest.items():
        precision = protocol.settings(CLASSES[protocol.task]).precision
        assert precision == "float32" or name in ours, f"{protocol}: {precision}"
    assert newest["voc07_svm"].version == 2 and newest["voc07_svm"].values["precision"] == "float32"


def test_each_known_difference_is_in_the_documentation() -> None:
    said = {str(p): p.differs for p in all_protocols() if p.differs}
    assert "8,192" in said["voc07_svm@1"] and "overflows" in said["vissl_knn@2"]
    shown = as_markdown()
    assert all(text in shown for text in said.values())


def test_published_values() -> None:
    # Global batch b: 0.4 b / 256 at b = 256; SimSiam 0.1 * 4096 / 256 = 1.6; 13 rates of DINOv2, times 4.
    def linear(name):
        return load_protocol(name, "linear").settings(LinearProtocol)

    assert linear("intl_linear@1").rates == [0.4]
    assert linear("moco_linear@1").rates == [30]
    # I-JEPA's appendix A: three rates (a batch of 256; 16384 / 256 = 64) by two decays by two features
    ijepa = linear("ijepa_linear@1")
    assert ijepa.rates == pytest.approx([0.64, 3.2, 0.064]) and ijepa.grid_size == 12
    assert sorted(stages_of(ijepa.features)) == [f"block-{back}.patches" for back in (1, 2, 3, 4)]
    assert linear("simsiam_linear@1").rates == pytest.approx([1.6])
    assert linear("dinov2_sweep@1").rates == pytest.approx(
        [4 * r for r in linear("dinov2_sweep@1").learning_rates]
    )
    assert len(linear("dinov2_sweep@1").rates) == 13 and linear("dinov2_sweep@1").choose_on == "held-out"
    wider = linear("dinov2_sweep@2")
    assert wider.features == ("layer4", "layer3+layer4") and wider.grid_size == 26
    assert wider.rates == linear("dinov2_sweep@1").rates and linear("dinov2_sweep@1").features == ("layer4",)
    assert linear("swav_linear@1").std[0] == 0.228
    assert linear("dino_rn50_linear@1").rates == pytest.approx([1.2])  # 0.3 * 1024 / 256
    assert linear("lightly_linear@2").drop_last and not linear("lightly_linear@1").drop_last
    assert linear("dinov2_sweep_on_val@2").choose_epoch == "last"
    for name in ("intl_cifar_linear@2", "intl_cifar_5nn@2"):  # of CIFAR-100 too
        values = load_protocol(name).settings(CLASSES[load_protocol(name).task])
        assert (values.mean, values.std) == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
        assert values.image_size == 32
    online = load_protocol("solo_knn_online@1").settings(KnnProtocol)
    assert (online.metric, online.ks) == ("euclidean", (20,))
    both = [linear(f"{name}_logreg@1") for name in ("dinov2", "ssl_transfer")]
    for values, held in zip(both, ((10, "random"), (20, "published"))):
        assert (values.resize, values.crop, values.interpolation) == (224, 224, "bicubic")
        assert (values.scaling, values.held_out_percent, values.held_out) == ("none", *held)
    # DINOv2: C = 10^-6 ... 10^5; ssl-transfer: C = 1 / wd, wd = 10^-6 ... 10^5, in this order
    assert both[0].costs == pytest.approx(np.logspace(-6, 5, 45), rel=1e-5)
    assert both[1].costs == pytest.approx(1 / np.logspace(-6, 5, 45), rel=1e-5)
    svm, low = linear("voc07_svm@2"), linear("voc07_svm_low_shot@2")
    assert (svm.resize, svm.crop, svm.fit, svm.pooling) == (256, 224, "squash", "6x6")
    assert (low.resize, low.crop, low.fit, low.pooling) == (None, 224, "squash", "6x6")
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
        (TEXT.replace("[3]", "three"), "ks: 'three': wanted a list of whole numbers"),
        (TEXT.replace("source: s", "source: [s]"), "wanted text"),
        (TEXT.replace("  ks: [3]\n", ""), "ks missing"),
        (TEXT.replace("source: s\n", ""), "wanted the entries"),
        (TEXT.replace("task: knn", "task: guess"), "task 'guess'"),
        ("a: [", "not YAML"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine@1.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", "\\[")):
        load_protocol(str(path)).settings(KnnProtocol)


WRONG = {
    "knn": [
        ("temperature: 0", "temperature: 0: wanted a number above 0"),
        ("temperature: .nan", "above 0"),
        ("temperature: -1", "above 0"),
        ("temperature: warm", "wanted a number"),
        ("ks: []", "ks: .*at least one"),
        ("ks: [0]", "1 or more"),
        ("ks: [5, 5]", "each once"),
        ("ks: [2.5]", "list of whole numbers"),
        ("vote: loud", "wanted weighted or majority"),
        ("std: [0.2]", "std: .*three numbers"),
        ("std: [0.2, 0.2, 0]", "above 0"),
        ("mean: [1, 2]", "mean: .*three numbers"),
        ("resize: 200", "at least crop, 224"),
        ("crop: -8", "crop: -8: wanted 8 px or more"),
        ("resize: null", "fit: squash"),
        ("image_size: 4", "8 px"),
        ("image_size: huge", "whole number or native"),
        ("precision: double", "auto or float32"),
        ("ks: [20000000]", "at most 1,000,000"),
        ("temperature: 1e300", "at most 1e\\+100"),
        ("crop: 100000", "at most 4,096"),
        ("resize: 1000000000", "at most 8,192"),
        (f"ks: {list(range(1, 1002))}", "at most 1000 entries"),
        (f"vote: {'x' * 2000}", "weighted or majority"),
    ],
    "linear": [
        ("batch: -5", "batch: -5: wanted 1 or more"),
        ("steps_per_epoch: -1", "steps_per_epoch: -1: wanted 1"),
        ("steps_per_epoch: 0", "wanted 1"),
        ("epochs: 0", "epochs: 0: wanted 1"),
        ("learning_rates: []", "at least one"),
        ("learning_rates: [-0.1]", "above 0"),
        ("weight_decays: []", "weight_decays: .*at least one"),
        ("weight_decays: [-1]", "0 or more"),
        ("momentum: 1", "0 to below 1"),
        ("gamma: 0", "above 0"),
        ("milestones: [8, 6]", "rising"),
        ("milestones: [0]", "rising"),
        ("final: 2", "final: 2: wanted 0 to 1"),
        ("schedule: exponential", "final: 0.0: wanted above 0"),
        ("held_out_percent: 100", "0 to below 100"),
        ("method: svm", "costs: .*at least one"),
        ("costs: [0]", "above 0"),
        ("folds: 1", "2 or more"),
        ("iterations: 0", "1 or more"),
        ("shots: [0]", "1 or more"),
        ("samples: 0", "1 or more"),
        ("features: []", "wanted at least one"),
        ("batch: true", "wanted a whole number"),
        ("batch: 200000", "at most 131,072"),
        ("epochs: 1000000", "at most 100,000"),
        ("steps_per_epoch: 390626", "1 to 390,625 of batch 256"),
        ("iterations: 100000000", "at most 10,000,000"),
        (f"learning_rates: {[0.1] * 1001}", "at most 1000 entries"),
        ("costs: [1e101]", "at most 1e\\+100"),
        ("samples: 1001", "at most 1,000"),
        ("milestones: [1000001]", "at most 1,000,000"),
        ("pooling: 6x6", "only svm"),
    ],
    "semisup": [
        ("lr_head: {}", "lr_head"),
        ("lr_head: {'5': 0.1}", "percent of labels"),
        ("lr_head: {'1': -1}", "0 .* or more"),
        ("lr_head: {'10': 0.1}", "shares of lr_backbone"),
        ("batch: 1", "2 images or more"),
        ("batch: 20000000000", "batch: 20000000000: wanted at most 131,072"),
        ("batch: 2e10", "whole number"),
        ("epochs: 20000000000", "at most 100,000"),
        ("lr_head: {'1': 1e101}", "at most 1e\\+100"),
        ("auto_augment: rand-m9-n1000000", "n 1000000: wanted 1 to 20"),
        ("auto_augment: rand-m99999999999999", "wanted 0 to 30"),
        ("auto_augment: rand-m9.5", "timm's words"),
        ("auto_augment: rand-p2", "p 2: wanted 0 to 1"),
        ("epochs: -1", "1 or more"),
        ("weight_decay: -1", "0 or more"),
        ("std: [1]", "three numbers"),
        ("lr_head: 3", "entries such as"),
    ],
}
SOUND = {
    "knn": {"ks": "[3]"}, "linear": {"learning_rates": "[0.1]"},
    "semisup": {"lr_backbone": "{'1': 0.1}", "lr_head": "{'1': 0.1}"},
}  # fmt: skip


@pytest.mark.parametrize(("task", "line", "message"), [(t, *case) for t in WRONG for case in WRONG[t]])
def test_a_value_out_of_range_is_refused_by_its_key(
    tmp_path: Path, task: str, line: str, message: str
) -> None:
    key, _, value = line.partition(": ")
    lines = [f"  {k}: {v}" for k, v in (SOUND[task] | {key: value}).items()]
    path = tmp_path / "mine@1.yaml"
    path.write_text("\n".join([f"task: {task}", "title: t", "source: s", "values:", *lines]))
    with pytest.raises(UserError, match=rf"protocol mine@1: .*{message}"):
        load_protocol(str(path), task).settings(CLASSES[task])


def test_every_number_of_every_protocol_is_bounded() -> None:
    """The largest value that a file can hold of each whole number, a list's entries too, is refused."""
    for name, cls in CLASSES.items():
        for key, hint in typing.get_type_hints(cls).items():
            if "int" in str(hint) and "Literal" not in str(hint):
                value = [10**18] if "tuple" in str(hint) else 10**18
                values = {key: value}
                protocol = Protocol(name="x", version=1, task=name, title="", source="", values=values)
                with pytest.raises(UserError, match=f"protocol x@1: {key}: .*wanted at most "):
                    protocol.settings(cls)


def test_a_batch_larger_than_the_set_is_one_permutation() -> None:
    (only,) = epoch_batches(10, 2 * 10**10, seed=0, epoch=0)  # drawn once, not until the batch is full
    assert sorted(only) == list(range(10))


def test_a_file_of_ones_own_may_not_take_the_name_of_another(tmp_path: Path) -> None:
    path = tmp_path / "solo_knn@1.yaml"
    path.write_text(TEXT)
    with pytest.raises(
        UserError, match=r"solo_knn@1 is a protocol of this project with other values; give .* mine_"
    ):
        load_protocol(str(path))
    shipped = (FOLDER / "solo_knn@1.yaml").read_text()
    path.write_text(shipped.replace("title: ", "title: my remark on "))
    assert load_protocol(str(path)).hash == load_protocol("solo_knn@1").hash
    path.rename(tmp_path / "solo_knn@77.yaml")
    (tmp_path / "solo_knn@77.yaml").write_text(TEXT)  # a version that is not out yet is one's own
    assert load_protocol(str(tmp_path / "solo_knn@77.yaml")).version == 77


def test_unknown_and_misplaced_names_list_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"did you mean solo_knn@[12].*"):
        load_protocol("solo_knn", "knn")
    with pytest.raises(UserError, match="is for linear; for knn"):
        load_protocol("moco_linear@1", "knn")
    with pytest.raises(UserError, match="held_out_percent"):
        LinearProtocolFile = load_protocol("dinov2_sweep@1")
        values = dict(LinearProtocolFile.values) | {"held_out_percent": 0}
        type(LinearProtocolFile)(
            name="x", version=1, task="linear", title="", source="", values=values
        ).settings(LinearProtocol)
    assert transfer_main(["protocols", "solo_knn@1"]) == 0 and "temperature: 0.07" in capsys.readouterr().out
    table = as_markdown()
    assert all(f"`{p}`" in table for p in all_protocols())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["knn", "--protocol", "dino_knn@2", "--k", "20"], "protocols show dino_knn@2` prints it; copy it"),
        (["linear", "--lr", "0.1"], "protocols show NAME@VERSION` prints it"),
        (["knn", "--mean", "3"], "--mean 3: wanted a list of numbers, such as [0.1, 0.2] ("),
        (["inspect", "--weights", "none.pth"], "none.pth: no such file"),
    ],
)
def test_hints_of_the_evaluators(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer_main(words) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(UserError, match=r"my/none@1\.yaml: no such file"):
        load_protocol("my/none@1.yaml")
    with pytest.raises(UserError, match="unknown protocol 'none@1'"):
        load_protocol("none@1")
