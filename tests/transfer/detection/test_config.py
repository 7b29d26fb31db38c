"""Every key of detectron2's config is used or refused; YAML runs nothing; models that must build do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import pytest
import torch
import yacs.config
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from transfer.conversion.availability import CONFIGS
from transfer.detection import config, schedule
from transfer.detection.config import load_config
from transfer.detection.protocol import flat
from transfer.detection.semantic import keys
from transfer.detection.semantic.learning_rate import build_schedule
from transfer.detection.semantic.mapper import SemanticMapper, mapper_of

ELSEWHERE = {"VERSION"}
"""Read by detectron2 from the file, not from the config: another version is converted or refused."""
TINY = ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet",
             "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
             "MODEL.RESNETS.OUT_FEATURES", "['res3','res4','res5']",
             "MODEL.FPN.IN_FEATURES", "['res3','res4','res5']",
             "MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[64],[128],[256],[512]]"]  # fmt: skip
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
FEDERATED = ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True",
             "DATASETS.TRAIN", "('lvis_v1_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1203"]  # fmt: skip


class Reads:
    """Which keys of marked configs were read, by attribute, by anybody."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        plain = yacs.config.CfgNode.__getattr__

        def noted(node: Any, name: str) -> Any:
            value = plain(node, name)
            place = node.__dict__.get("_place")
            if place is not None and not isinstance(value, Mapping):
                self.keys.add(place + name)
            return value

        monkeypatch.setattr(yacs.config.CfgNode, "__getattr__", noted)

    def mark(self, cfg: CfgNode, place: str = "") -> CfgNode:
        cfg.__dict__["_place"] = place  # copies keep it
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                self.mark(value, f"{place}{key}.")
        return cfg


def test_every_key_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    for words in (
        [], KEYPOINTS, CASCADE, RETINANET, FEDERATED,
        ["MODEL.RPN.HEAD_NAME", "StandardRPNHead", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "INPUT.CROP.ENABLED", "True"],
        ["INPUT.RANDOM_FLIP", "none"],
    ):  # fmt: skip
        cfg = reads.mark(load_config("scenes_R18_FPN", [*TINY, *words]).clone())
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        if "FixedGamma" in cfg.SOLVER.LR_SCHEDULER_NAME:
            cfg.defrost()
            cfg.SOLVER.STEPS = [1, 2]
        build_lr_scheduler(cfg, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # clips gradients
        if words != KEYPOINTS:
            DatasetMapper(cfg, is_train=True)
            DatasetMapper(cfg, is_train=False)
    DatasetMapperTTA(cfg)
    assert unused(reads, get_cfg(), config.REFUSED) == ELSEWHERE


def unused(reads: Reads, default: CfgNode, refused: Mapping[str, str]) -> set[str]:
    """The keys that neither a mark has seen read nor a run reads, and that are not refused either."""
    folder = Path(config.__file__).parent  # a run reads them in these modules, named as they name it
    names = (
        "config",
        "data",
        "batches",
        "evaluation",
        "run",
        "train_loop",
        "precise_bn",
        "protocol",
        "semantic/sets",
    )
    ours = "\n".join((folder / f"{name}.py").read_text() for name in names)
    unread = {key for key in flat(default) if key not in reads.keys and f"cfg.{key}" not in ours}
    return unread - {k for k in unread for r in refused if k == r or (r[-1] in "._" and k.startswith(r))}


def test_every_key_of_semantic_segmentation_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    for words in (
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True"],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"],
    ):  # fmt: skip
        cfg = reads.mark(load_config("small_R18_FCN", ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "8", *words]).clone())
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        build_schedule(cfg, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for train in (True, False):
            mapper_of(cfg, train=train)
    default = get_cfg()
    keys.add_keys(default)
    assert unused(reads, default, keys.REFUSED) == ELSEWHERE


OTHER_VALUES = {"bool": lambda v: not v, "int": lambda v: v + 1, "float": lambda v: v + 0.5,
                "list": lambda v: (*v, "x") if v else ("x",), "str": lambda v: v + "x"}  # fmt: skip


def test_keys_without_effect_are_refused_when_changed() -> None:
    default = flat(get_cfg())
    keys = [k for k in default for r in config.REFUSED if k == r or (r[-1] == "." and k.startswith(r))]
    assert len(keys) >= 18
    for key in keys:
        other = OTHER_VALUES[type(default[key]).__name__](default[key])
        with pytest.raises(UserError, match=rf"{key} .* would have no effect"):
            load_config("scenes_R18_FPN", [key, str(other)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"],
            "can be TrainingSampler or RepeatFactor",
        ),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "REPEAT_THRESHOLD 0"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "can be GeneralizedRCNN or RetinaNet or Dil"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "DilatedSegmentor here; take a sem_seg config"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"], "can be RPN here"),
        ([*KEYPOINTS, "TEST.AUG.ENABLED", "True"], "boxes and masks of an R-CNN alone"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "wanted the least and the largest size"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "3"], "share SOLVER.IMS_PER_BATCH 8"),
    ],
)
def test_what_cannot_be_judged_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("scenes_R18_FPN", words)


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [(config, words, said) for config, cases in {
        "small_R18_FCN": [
            ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT 0.0", "0.0: wanted 1e-06 to 1e+06"),
            ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT -1.0", "-1.0: wanted 1e-06"),
            ("MODEL.SEM_SEG_HEAD.AUX_WEIGHT -0.4", "-0.4: wanted 0 to"),
            ("MODEL.SEM_SEG_HEAD.CONVS_DIM 0", "0: wanted 1 to 32768"),
            ("MODEL.SEM_SEG_HEAD.DILATION 0", "0: wanted 1 to 1000"),
            ("MODEL.SEM_SEG_HEAD.NORM bn", "bn: wanted .* or BN or "),
            ("SOLVER.POLY_LR_POWER -1.0", "-1.0: wanted 1e-06 to 100"),
            ("SOLVER.LR_SCHEDULER_NAME Poly", "Poly: wanted WarmupMultiStepLR or"),
            ("INPUT.CROP.SIZE (40,)", "(40,): wanted 2 values"),
            ("INPUT.CROP.SIZE ('a','b')", "(a, b): wanted numbers"),
            ("INPUT.CROP.SIZE (0.5,0.5)", "wanted height and width in pixels"),
            ("TEST.SLIDE.WINDOW -3", "-3: wanted 0 to 10000"),
        ],
        "scenes_R18_FPN": [
            ("INPUT.MIN_SIZE_TEST -1", "-1: wanted 0 to 10000"),
            ("INPUT.MAX_SIZE_TEST 1", "1: wanted 32 to 10000"),
            ("INPUT.MIN_SIZE_TRAIN ()", "(): wanted 1 to 1000 values"),
            ("INPUT.MIN_SIZE_TRAIN ('a',)", "(a,): wanted numbers"),
            ("INPUT.FORMAT YUV", "YUV: wanted RGB or BGR"),
            ("INPUT.CROP.TYPE circle", "circle: wanted relative or"),
            ("INPUT.RANDOM_FLIP sideways", "sideways: wanted horizontal or vertical or none"),
            ("INPUT.MASK_FORMAT paper", "paper: wanted polygon or bitmask"),
            ("SOLVER.BASE_LR 0.0", "0.0: wanted 1e-12 to"),
            ("SOLVER.BASE_LR 1e999", "inf: wanted 1e-12 to"),
            ("SOLVER.MOMENTUM 1.5", "1.5: wanted 0 to 1"),
            ("SOLVER.MAX_ITER 0", "0: wanted 1 to 1e+09"),
            ("SOLVER.IMS_PER_BATCH 0", "0: wanted 1 to"),
            ("SOLVER.STEPS (-5,)", "(-5,): wanted 1 to"),
            ("MODEL.PIXEL_STD (1.0,)", "(1.0,): wanted 3 values"),
            ("MODEL.PIXEL_STD (1.0,0.0,1.0)", "(1.0, 0.0, 1.0): wanted 1e-06 to"),
            ("MODEL.PIXEL_MEAN (1.0,1.0,1.0,1.0)", "wanted 3 values"),
            ("MODEL.FPN.NORM Batch", "Batch: wanted .* or BN or"),
            ("MODEL.BACKBONE.FREEZE_AT 99", "99: wanted 0 to 5"),
            ("MODEL.RESNETS.DEPTH 20", "20: wanted 18 or 34 or 50 or"),
            ("MODEL.RESNETS.OUT_FEATURES ('res7',)", "(res7,): wanted stem or res2"),
            ("MODEL.ROI_HEADS.SCORE_THRESH_TEST 2.0", "2.0: wanted 0 to 1"),
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE Max", "Max: wanted ROIAlignV2 or"),
            ("MODEL.DEVICE toaster", "toaster: wanted cuda or cpu"),
            (f"SEED {10**30}", "wanted -1 to 2.14748e+09"),
            ("DATALOADER.NUM_WORKERS -1", "-1: wanted 0 to 1024"),
            ("TEST.DETECTIONS_PER_IMAGE 0", "0: wanted 1 to"),
            ("SOLVER.STEPS None", "None: wanted a value, such as (30000,)"),
            ("DATASETS.TRAIN None", "None: wanted a value, such as ()"),
            ("SOLVER.BASE_LR None", "None: wanted a value, such as 0.001"),
        ],
    }.items() for words, said in cases],
)  # fmt: skip
def test_values_that_nothing_could_work_with_are_refused_by_their_key(
    config: str, words: str, said: str
) -> None:
    key, value = words.split()
    with pytest.raises(UserError) as refused:
        load_config(config, [key, value])
    assert str(refused.value).startswith(f"{key} ") and re.search(
        re.escape(said).replace(r"\.\*", ".*"), str(refused.value)
    )


def test_every_shipped_config_of_detectron2_has_values_in_range() -> None:
    """Its own and ours: they are read, or refused for what they are, never for one of these values."""
    own = Path(detectron2.__file__).parent / "model_zoo/configs"
    files = [*own.glob("*/*R_50*.yaml"), *CONFIGS.glob("*_R*.yaml")]
    assert len(files) > 60
    for file in files:
        try:
            load_config(file, [], to_run_here=False)
        except UserError as error:
            assert re.search("whole scenes|would have no effect|can be |determine a constr", str(error)), file


def test_a_size_of_0_leaves_images_as_they_are() -> None:
    cfg = load_config("small_R18_FCN", ["INPUT.MIN_SIZE_TEST", "0"])
    mapper = SemanticMapper(cfg, train=False)
    pixels = np.zeros((30, 50, 3), np.uint8)
    given = T.AugInput(pixels)
    mapper.augmentations(given)
    assert given.image.shape == (30, 50, 3)


def test_detectron2s_own_panoptic_config_is_refused_as_a_whole() -> None:
    """Not for one of its keys, whose default would help nobody."""
    shipped = Path(detectron2.__file__).parent / "model_zoo/configs/COCO-PanopticSegmentation"
    with pytest.raises(UserError, match=r"MODEL.META_ARCHITECTURE PanopticFPN: whole scenes are"):
        load_config(shipped / "panoptic_fpn_R_50_1x.yaml", [])


def test_reference_world_size_scales_as_detectron2_does() -> None:
    cfg = load_config("coco_R50_C4_2x", ["SOLVER.REFERENCE_WORLD_SIZE", "8"], ranks=4, to_run_here=False)
    # half the processes: half the batch and rate, twice the iterations
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (8, 0.01, 360000)
    assert cfg.SOLVER.STEPS == (240000, 320000)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/apply:os.mkdir"])
def test_yaml_runs_nothing(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    evil, heir = tmp_path / "evil.yaml", tmp_path / "heir.yaml"
    command = f"mkdir {mark}" if "system" in tag else str(mark)
    evil.write_text(f"OUTPUT_DIR: {tag} ['{command}']\n")
    heir.write_text("_BASE_: evil.yaml\n")
    for file in (evil, heir):
        assert run(schedule.main, ["--config-file", str(file), "--num-gpus", "1"]) == 2
        assert "could not determine a constructor" in capsys.readouterr().err
    assert not mark.exists()
    for text, said in (
        ("SEED: " + "9" * 5000, "not YAML"), ("SEED: 2001-99-99", "not YAML"), ("SEED: !!int ''", "not YAML"),
        ("SEED: !!float '.'", "not YAML"), ("SEED: .nan", "ismatch"),
        ("SOLVER: {BASE_LR: .nan}", "BASE_LR nan: wanted 1e-12"), ("- a", "wanted entries KEY: VALUE"),
        ("_BASE_: 5", "_BASE_: wanted a file's name"), ("_BASE_: /dev/zero", "zero is no file"),
        ("_BASE_: https://x/y.yaml", "No such file"), ("_BASE_: [heir.yaml, heir.yaml]", "leads back"),
        ("? [a, b]\n: 1", "not YAML"), ("1: 2", "wanted entries"), ("SOLVER: 5", "SOLVER"),
        ("MODEL: [1]", "MODEL"),
        ("MODEL: {META_ARCHITECTURE: 5}", "META_ARCHITECTURE"), ("MODEL: null", "MODEL"),
        ("DATASETS: {TRAIN: [[1]]}", "DATASETS.TRAIN"),
    ):  # fmt: skip
        heir.write_text(text + "\n")
        with pytest.raises(UserError, match=said) as refused:
            load_config(heir, [])
        assert len(str(refused.value)) < 1000
    heir.write_text("_BASE_: heir.yaml\n")
    with pytest.raises(UserError, match="_BASE_ leads back to itself"):
        load_config(heir, [])
