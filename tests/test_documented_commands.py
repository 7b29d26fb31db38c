"""Every command of the documentation is run as it stands there, section by section, in a small checkout.

`WAYS` says what is done to make a command small enough for a test; a command without an entry fails. Names
that stand for the reader's own data and files are replaced by those of `places`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch

from pretrain.checkpoint import save_backbone
from tests.helpers import checkpoint_zoo as zoo
from tests.helpers.forked import run_command
from tests.helpers.image_folders import copy_first
from tests.test_docs import ROOT, Command, commands

STAND_FOR = {
    "/data/imagenet": "{images}",
    "/data/cifar10": "{cifar}",
    "DIR": "{images}",
    "FILE": "{weights}",
    "model.pth.tar": "{weights}",
    "intl.pth": "{small}",
    "control.safetensors": "{control}",
    "/shared/out/intl": "{shared}",
    ".venv/bin/python": "python",
}
"""Whole words of the documentation, and what a test gives in their place (braces: see `places`)."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a documented command is run here."""

    runs: tuple[str, ...] = ("",)
    """Options appended to it, once for each run: they make it smaller, or say where it runs."""
    change: Mapping[str, str] = field(default_factory=dict)
    """Whole words changed: numbers of GPUs, of which there are none."""
    says: str = ""
    """What must be in the output of the last run."""
    leaves: tuple[str, ...] = ()
    """Files that must be there afterwards."""


def _make(says: str) -> Way:
    """`make -n`: what would be done in a checkout without environment (test_demo.py runs it)."""
    return Way(change={"make": "make -n"}, says=says)


# ImageNet's name is kept for its thousand classes, ResNet-50 for COCO's configs.
SMALLER = {"imagenet": "imagefolder", "{weights}": "{small}"}
# As many views as the recipe has, each small; two steps; a narrow projector.
STEPS = "--max-steps 2 --batch-global 16 --projector-hidden 64 --projector-output 64 --workers 0"
SIX_VIEWS = "--view-sizes [48,48,40,32,32,32]"
TWO_VIEWS = "--view-sizes [32,32]"
PRETRAINED = ("checkpoint.pt", "backbone.safetensors", "metrics.jsonl", "config.yaml")
DETECTOR = (
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 "
    "SOLVER.STEPS () SOLVER.WARMUP_ITERS 1 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 10 TEST.PRECISE_BN.NUM_ITER 2 "
    "DATALOADER.NUM_WORKERS 0 INPUT.MASK_FORMAT bitmask MODEL.ROI_HEADS.NUM_CLASSES {classes}"
)

WAYS: dict[str, Way] = {
    "make demo": _make(".venv/bin/python -m slurm demo --dataset fashion_mnist "),
    "make demo VENV=DIR": _make("{images}/bin/python -m slurm demo "),
    "make demo DATASET=cifar10 DATA=DIR": _make("-m slurm demo --dataset cifar10 --data-dir '{images}'"),
    "make test": _make('-m pytest -n 2 -m "not faults and not commands"'),
    "make test-commands": _make("-m pytest -n 2 -m commands"),
    "make test-bare": _make("tests/bare.sh"),
    "make test-matrix": _make("tests/matrix.py"),
    "make test-faults": _make("-m pytest -m faults"),
    "make lint": _make("-m mypy"),
    "make bench": _make("-m benchmarks"),
    "make env": _make("-m pip install"),
    "make env DETECTRON2=source": _make("git+https://github.com/facebookresearch/detectron2.git"),
    # The page that it writes anew is spoilt beforehand.
    "python -m pytest tests/test_docs.py": Way(runs=("-k generated",), says="6 passed"),
    "intl-transfer inspect": Way(says="complete: the backbone loads"),
    "intl-transfer protocols show": Way(says="  temperature: 0.07"),
    "intl-transfer zoo": Way(says="dino_resnet50"),
    # A manifest whose file is at hand, with a figure by a protocol of small images.
    "intl-transfer reproduce": Way(
        change={"dino_resnet50": "small --zoo {zoo}"},
        runs=("--dataset imagefolder --data-dir {few} --workers 0",),
        says="1 not comparable",
        leaves=("out/dino/reproduction.json", "out/dino/knn-small_knn-v1/results.jsonl"),
    ),
    "intl-transfer knn": Way(
        change=SMALLER,
        runs=("--image-size 64",),
        leaves=("out/knn/results.jsonl", "out/knn/config.yaml"),
    ),
    # The protocol's 100 epochs, as published, of twenty images.
    "intl-transfer linear": Way(
        change=SMALLER,
        runs=("--data-dir {few} --image-size 64 --workers 0",),
        leaves=("out/linear/results.jsonl", "out/linear/config.yaml"),
    ),
    **{
        f"intl-transfer {task} --weights {file}": Way(
            change={"fashion_mnist": "imagefolder"},
            runs=("--image-size 32 --workers 0",),
            leaves=(f"{output}/results.jsonl", f"{output}/config.yaml"),
        )
        for task in ("knn", "linear")
        for file, output in (("intl.pth", "out/intl"), ("control.safetensors", "out/control"))
    },
    # The published lists are of ImageNet's files, and downloaded; other data sets have a draw of their own.
    "intl-transfer semisup": Way(
        runs=("--data-dir {few} --image-size 64 --workers 0",),
        change=SMALLER | {"--lists": "", "download": ""},
        leaves=("out/semisup1/results.jsonl", "out/semisup1/config.yaml"),
    ),
    "intl-transfer export": Way(change=SMALLER, leaves=("out/hub/config.json", "out/hub/model.safetensors")),
    "intl-transfer leaderboard": Way(leaves=("out/leaderboard/index.html", "out/leaderboard/report.md")),
    "intl-transfer report": Way(leaves=("out/report/index.html", "out/report/report.md")),
    # Twenty images, without the ten views of each.
    "intl-transfer spectrum": Way(
        change={"imagenet": "imagefolder"},
        runs=("--data-dir {few} --no-views --workers 0 --image-size 64",),
        leaves=("out/spectrum/results.jsonl", "out/spectrum/pictures/spectra.svg"),
    ),
    "intl-transfer spectrum-study": Way(
        runs=(
            "--dataset imagefolder --data-dir {images} --output out/study --steps 2 --seeds 1 --batch 16 "
            "--features 24 --powers [0.25] --iterations [4] --bank 60 --queries 20",
        ),
        leaves=("out/study/study.md",),
    ),
    "intl-pretrain --help": Way(says="--view-sizes"),
    "intl-pretrain --recipe imagenet_ep100_multicrop_ema": Way(
        runs=(f"{STEPS} {SIX_VIEWS} --arch resnet18 --dataset imagefolder",),
        leaves=tuple(f"out/pretrain/{f}" for f in (*PRETRAINED, "backbone_ema.safetensors")),
    ),
    "intl-pretrain --recipe cifar10_ep1000": Way(
        runs=(f"{STEPS} {TWO_VIEWS}",), leaves=tuple(f"out/cifar10/{f}" for f in PRETRAINED)
    ),
    "intl-pretrain --recipe cifar10_two_cores": Way(
        runs=(f"{STEPS} {TWO_VIEWS}",), leaves=tuple(f"out/small/{f}" for f in PRETRAINED)
    ),
    "intl-transfer knn --weights out/small/backbone.safetensors": Way(
        runs=("--image-size 64",), leaves=("out/small/knn/results.jsonl",)
    ),
    # The protocol's epochs, as published, of twenty images.
    "intl-transfer linear --weights out/small/backbone.safetensors": Way(
        runs=("--dataset imagefolder --data-dir {few} --image-size 64 --workers 0",),
        leaves=("out/small/linear/results.jsonl",),
    ),
    "torchrun": Way(
        runs=(f"{STEPS} {TWO_VIEWS} --arch resnet18 --dataset imagefolder",),
        change={"8": "2"},
        leaves=tuple(f"out/ep800/{f}" for f in PRETRAINED),
    ),
    "python -m pretrain.profile": Way(
        runs=(f"{STEPS} {TWO_VIEWS} --arch resnet18 --dataset imagefolder --steps 1",),
        says="worth changing first",
    ),
    "intl-slurm suite --weights intl.pth": Way(
        change={"fashion_mnist": "imagefolder"}, says="all checks passed; nothing was submitted"
    ),
    "intl-slurm suite --weights": Way(
        runs=("--dataset imagefolder",), says="all checks passed; nothing was submitted"
    ),
    # As written up to submission (tests/cluster submits to a real SLURM); then on this machine, so that
    # there is a suite for status, logs and cancel.
    "intl-slurm suite --recipe": Way(
        runs=(
            "--dry-run --dataset imagefolder",
            "--cluster local --dataset imagefolder --profile local --seeds 1 --data-dir {few} "
            "--linear-protocol cached_linear@1 "
            f'--pretrain-options "{STEPS} {SIX_VIEWS} --arch resnet18"',
        ),
        leaves=("{shared}/pretrain/backbone.safetensors", "{shared}/report/index.html"),
    ),
    "intl-slurm status": Way(says="linear/intl/seed0"),
    "intl-slurm logs": Way(says="linear/intl/seed0"),
    "intl-slurm cancel": Way(says="nothing was queued or running"),
    "intl-transfer convert": Way(leaves=("model.pkl",), says="proved equal in detectron2"),
    "intl-transfer plan": Way(says="append to train_net: "),
    "intl-transfer train-net": Way(
        runs=(DETECTOR,),
        change={"8": "0 --dataset coco_2017_train={coco} --dataset coco_2017_val={coco}"},
        leaves=("out/coco/results.jsonl", "out/coco/config.yaml", "out/coco/model_final.pth"),
    ),
}
"""Ways by the words that a command begins with; the longest that fits counts."""

RUN = [c for c in commands() if not c.is_a_name]
SECTIONS = list(dict.fromkeys((c.page, c.section) for c in RUN))


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """Variables set before a command, and its words."""
    words = shlex.split(line)
    count = next(i for i, w in enumerate(words) if "=" not in w)
    return dict(w.split("=", 1) for w in words[:count]), words[count:]


def way_of(line: str) -> str | None:
    """The key in WAYS."""
    words = split(line)[1]
    words[0] = "python" if words[0].endswith("/python") else words[0]
    fit = [key for key in WAYS if words[: len(key.split())] == key.split()]
    return max(fit, key=len, default=None)


def argv_of(line: str, way: Way, more: str, places: Mapping[str, str]) -> list[str]:
    """The words that are run: those of the documentation, changed, with `more` appended."""
    changed: list[str] = []
    for word in split(line)[1]:
        name, equals, value = word.partition("=")
        value = STAND_FOR.get(value, value)
        word = STAND_FOR.get(word, f"{name}{equals}{value}")
        changed += way.change[word].split() if word in way.change else [word]
    return [w.format_map(places) for w in (*changed, *shlex.split(more))]


@pytest.mark.parametrize("command", RUN, ids=lambda c: f"{c.page}: {c.line[:60]}")
def test_every_command_has_an_entry(command: Command) -> None:
    assert way_of(command.line), f"{command.page}: {command.line}: say in WAYS how to run it small"


def test_no_entry_is_left_over_and_the_check_can_fail() -> None:
    assert {way_of(c.line) for c in RUN} == set(WAYS)
    assert way_of("intl-transfer inspectors FILE") is None
    assert way_of("make demolish") is None and way_of("intl-transfer supervise --weights w") is None


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """What commands use of the project, as one finds it after `git clone`; removed with all they wrote."""
    folder = tmp_path / "intl-bench"
    for name in ("pretrain", "transfer", "slurm", "detection_configs", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests/helpers").mkdir(parents=True)
    tests = ("conftest.py", "test_docs.py", "helpers/image_folders.py", "helpers/results_schema.py")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", *(f"tests/{name}" for name in tests)):
        shutil.copyfile(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(tmp_path)  # checkpoints of ResNet-50s


@pytest.fixture(scope="module")
def images(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/{train,val}: 20 and 2 real images a class (k-NN wants 200 neighbours); few/: 2 and 1."""
    root = tmp_path_factory.mktemp("data")
    for folder, train, val in (("images", 20, 2), ("few", 2, 1)):
        copy_first(cifar_folder / "train", root / folder / "train", train)
        copy_first(cifar_folder / "test", root / folder / "val", val)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A ResNet-50 and a `small` ResNet-18 as MoCo's training script saves them, a `control` as this project
    does; their BatchNorm has counted a batch, so they are not taken for untrained ones. `zoo`: a manifest of
    the small one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    paths = {"weights": folder / "model.pth.tar", "small": folder / "small.pth.tar"}
    for path, arch in zip([*paths.values()], ("resnet50", "resnet18")):
        both = [dict(timm.create_model(arch, num_classes=0).state_dict()) for _ in range(2)]
        for state in both:
            state |= {key: value + 1 for key, value in state.items() if key.endswith("num_batches_tracked")}
        build, _ = zoo.ZOO["MoCo v1, v2; PCL"]
        torch.save({**build(*both), "arch": arch}, path)
    values = {
        "ks": [1],
        "temperature": 0.07,
        "vote": "weighted",
        "metric": "cosine",
        "resize": 32,
        "crop": 32,
    }
    protocol = {"task": "knn", "title": "of a test", "source": "a test", "values": values}
    (folder / "small_knn@1.yaml").write_text(json.dumps(protocol))
    figure = {"task": "knn", "dataset": "imagefolder", "n": 10, "protocol": "small_knn@1.yaml"}
    entry = {"url": paths["small"].as_uri(), "source": "https://example.org"}
    entry |= {"figures": [figure | {"metrics": {"top1_k1": 50.0}}]}
    paths["control"] = folder / "control.safetensors"
    save_backbone(paths["control"], both[0], {"arch": "resnet18", "stem": "imagenet", "branch": "online"})
    paths["zoo"] = folder / "zoo.yaml"
    paths["zoo"].write_text(json.dumps({"checkpoints": {"small": entry}}))
    yield paths
    shutil.rmtree(folder)


def few_of_coco(source: Path, folder: Path, count: int = 4) -> tuple[str, int]:
    """ANNOTATIONS.json:IMAGES of the first images with objects, and the number of categories."""
    content = json.loads((source / "instances.json").read_text())
    with_objects = {a["image_id"] for a in content["annotations"]}
    content["images"] = [i for i in content["images"] if i["id"] in with_objects][:count]
    kept = {i["id"] for i in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (folder / "few.json").write_text(json.dumps(content))
    return f"{folder / 'few.json'}:{source / 'images'}", len(content["categories"])


def login_node(folder: Path) -> Path:
    """A folder with SLURM's answers to what is asked before submission; sbatch, if called, leaves a trace."""
    folder.mkdir()
    answers = {"sinfo": "echo gpu", "sacctmgr": "exit 1", "sbatch": f"touch {folder / 'called'}; exit 1"}
    for name, line in answers.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.commands
@pytest.mark.parametrize(("page", "section"), SECTIONS, ids=lambda v: v or "(top)")
def test_commands_of_a_section_run_in_order(
    page: str, section: str, checkout: Path, images: Path, weights: dict[str, Path], cifar_folder: Path,
    tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    lines = [c.line for c in RUN if (c.page, c.section) == (page, section)]
    places = {
        "images": str(images / "images"), "few": str(images / "few"), "cifar": str(cifar_folder),
        **{name: str(path) for name, path in weights.items()}, "shared": str(tmp_path / "shared" / "intl"),
    }  # fmt: skip
    if any("convert" in line or "train_net" in line for line in lines):
        pytest.importorskip("detectron2")
        coco, classes = few_of_coco(request.getfixturevalue("coco_mini"), tmp_path)
        places |= {"coco": coco, "classes": str(classes)}
    stale = checkout / "docs" / "formats.md"
    if any("UPDATE_DOCS" in line for line in lines):
        stale.write_text("as it was before the change\n")
    node = login_node(tmp_path / "bin")
    path = os.pathsep.join([str(node), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE", "MFLAGS"))}
    if any("zoo" in line or "reproduce" in line for line in lines):
        environment["INTL_BENCH_DATA"] = str(tmp_path / "cache")
    environment |= {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for line in lines:
        key, said = way_of(line), ""
        assert key, f"{line}: say in WAYS how to run it small"
        way = WAYS[key]
        for more in way.runs:
            argv = argv_of(line, way, more, places)
            done = run_command(argv, cwd=checkout, env=environment | split(line)[0])
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{line}\n{shlex.join(argv)}\n{said}"
        assert way.says.format_map(places) in said, f"{line}\n{said}"
        missing = [f for f in (w.format_map(places) for w in way.leaves) if not (checkout / f).is_file()]
        assert not missing, f"{line}\n{missing} not written\n{said}"
    assert not (node / "called").exists()
    assert stale.read_text() == (ROOT / "docs" / "formats.md").read_text()
