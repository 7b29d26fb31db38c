"""Every key of detectron2's config is used or refused; YAML runs nothing; models that must build do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2
import pytest
import torch
import yacs.config
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from transfer.detection import config, schedule
from transfer.detection.config import load_config
from transfer.detection.pixels import keys
from transfer.detection.pixels.learning_rate import build_schedule
from transfer.detection.pixels.mapper import mapper_of
from transfer.detection.protocol import flat

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
        "pixels/sets",
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
    heir.write_text("_BASE_: heir.yaml\n")
    with pytest.raises(UserError, match="_BASE_ leads back to itself"):
        load_config(heir, [])
