"""The checkpoint formats that can be read, as data; `python -m transfer formats` prints them.

The networks of a file are found by their layers, wherever they lie (`transfer.checkpoints.search`). A format
says what a place means: which branch, what lies beside it, which padding. Keys are compared without any
`module.` (DDP) and `_orig_mod.` (torch.compile) in them, wherever those stand.
"""

from __future__ import annotations

from transfer.checkpoints.format import Format, Place


def _at(container: str, *prefixes: str) -> tuple[Place, ...]:
    return tuple(Place(container, prefix) for prefix in prefixes)


_BARE = tuple(Place(container, "") for container in ("", "state_dict", "model", "model_state_dict"))
_LIGHTLY_HEADS = (
    ("projection_head", "projector"), ("prediction_head", "predictor"), ("prototypes", "prototypes"),
    ("student_projection_head", "projector"), ("student_prediction_head", "predictor"),
    ("teacher_projection_head", "EMA projector"), ("query_projection_head", "projector"),
    ("key_projection_head", "EMA projector"), ("projection_head_momentum", "EMA projector"),
    ("online_classifier", "online classifier"), ("criterion", "state of the loss"),
    ("queues", "queue"), ("memory_bank", "queue"),
)  # fmt: skip
_LIGHTLY_VITS = (
    ("backbone.mask_token", "mask token"), ("student_backbone.mask_token", "mask token"),
    ("teacher_backbone.mask_token", "mask token"), ("decoder", "decoder"), ("student_head.", "projector"),
    ("teacher_head.", "EMA projector"),
)  # fmt: skip

OWN_RUN = Format(
    name="this project, training run",
    online=_at("model", "backbone."),
    ema=_at("ema", "backbone."),
    drop=(("projector", "projector"),),
    cifar_padding=2,
)
OWN_BACKBONE = Format(name="this project, backbone file", online=_at("", ""), cifar_padding=2)
OWN_BACKBONE_EMA = Format(name="this project, EMA backbone file", online=(), ema=_at("", ""), cifar_padding=2)

FOREIGN: tuple[Format, ...] = (
    Format(
        name="torchvision or timm",
        online=_BARE, ema=_at("state_dict_ema", "") + _at("model_ema", ""),
        # Barlow Twins', VICReg's and DINO's backbone files are such too
        drop=(("fc.", "classifier"), ("n_averaged", "count of averaged steps")), families=("resnet",),
    ),
    Format(
        name="timm, other networks",
        online=_BARE, ema=_at("state_dict_ema", "") + _at("model_ema", ""),
        # so are DINO's, MAE's, VICRegL's and ConvNeXt V2's backbone files
        drop=(
            ("head.", "classifier"), ("head_dist.", "classifier"), ("classifier.", "classifier"),
            ("heads.head.", "classifier"), ("norms.", "norms of other stages"),
            ("n_averaged", "count of averaged steps"),
        ),
        families=("vit", "convnext", "timm"),
    ),
    Format(
        name="INTL",
        online=_at("state_dict", "backbone."), ema=_at("state_dict", "momentum_backbone."),
        drop=(("projection.", "projector"), ("momentum_projection.", "EMA projector")),
        needs=("projection.", "momentum_projection."), cifar_padding=2,
        note="INTL's own evaluation uses the online branch",
    ),
    Format(
        name="MoCo v1, v2; PCL",
        online=_at("state_dict", "encoder_q."), ema=_at("state_dict", "encoder_k."),
        drop=(("encoder_q.fc.", "projector"), ("encoder_k.fc.", "EMA projector"), ("queue", "queue")),
    ),
    Format(
        name="MoCo v3",
        online=_at("state_dict", "base_encoder."), ema=_at("state_dict", "momentum_encoder."),
        drop=(
            ("base_encoder.fc.", "projector"), ("base_encoder.head.", "projector"),
            ("momentum_encoder.fc.", "EMA projector"), ("momentum_encoder.head.", "EMA projector"),
            ("predictor.", "predictor"),
        ),
        many_heads="always", positions="bicubic",
    ),
    Format(
        name="SimSiam",
        online=_at("state_dict", "encoder."),
        drop=(("encoder.fc.", "projector"), ("predictor.", "predictor")), needs=("encoder.fc.",),
    ),
    Format(
        name="Barlow Twins, VICReg",
        online=_at("model", "backbone."),
        drop=(("projector.", "projector"), ("bn.", "normalisation of the embedding")),
    ),
    Format(
        name="SwAV, DeepCluster-v2, SeLa-v2",
        online=_BARE[:2], drop=(("projection_head", "projector"), ("prototypes", "prototypes")),
        needs=("projection_head", "prototypes"),
    ),
    Format(
        name="DINO",
        online=_at("student", "backbone."), ema=_at("teacher", "backbone."), drop=(("head.", "projector"),),
        positions="bicubic offset",
        note="DINO's own evaluation uses the teacher: --branch ema",
    ),
    Format(
        name="iBOT",
        online=_at("student", "backbone."), ema=_at("teacher", "backbone."),
        drop=(("head.", "projector"), ("backbone.masked_embed", "mask token")), top="ibot_loss",
        families=("vit", "timm"), positions="bicubic offset",
        note="iBOT's own evaluation uses the teacher: --branch ema",
    ),
    Format(
        name="DINOv2, DINOv3",
        online=_at("student", "backbone."), ema=_at("teacher", "backbone."),
        drop=(
            ("dino_head.", "projector"), ("ibot_head.", "projector of patches"),
            ("backbone.mask_token", "mask token"), ("backbone.local_cls_norm.", "norm of local crops"),
        ),
        needs=("dino_head.", "backbone.mask_token"), families=("vit",), positions="bicubic offset",
        note="their own evaluation uses the teacher: --branch ema",
    ),
    Format(
        name="DINOv2, DINOv3, backbone file",
        online=_BARE,
        drop=(
            ("mask_token", "mask token"), ("local_cls_norm.", "norm of local crops"), ("head.", "classifier"),
        ),
        needs=("mask_token",), families=("vit",), positions="bicubic offset",
    ),
    Format(
        name="MAE",
        online=_BARE, drop=(("decoder_", "decoder"), ("mask_token", "mask token")), needs=("decoder_",),
        families=("vit",), positions="bicubic",
    ),
    Format(
        name="MSN, I-JEPA",
        online=_at("encoder", ""), ema=_at("target_encoder", ""),
        drop=(("fc.", "projector"), ("pred.", "predictor")), families=("vit",), positions="bicubic",
        note="their own evaluation uses target_encoder: --branch ema",
    ),
    Format(
        name="ConvNeXt V2, FCMAE in training",
        online=_at("model", "encoder."),
        drop=(
            ("decoder.", "decoder"), ("proj.", "decoder"), ("pred.", "decoder"), ("mask_token", "mask token")
        ),
        needs=("mask_token",), families=("convnext",),
    ),
    Format(
        name="solo-learn",
        online=_at("state_dict", "backbone.", "encoder."),
        ema=_at("state_dict", "momentum_backbone.", "momentum_encoder."),
        drop=(
            ("projector.", "projector"), ("predictor.", "predictor"), ("classifier.", "online classifier"),
            ("momentum_projector.", "EMA projector"), ("momentum_predictor.", "EMA predictor"),
            ("momentum_classifier.", "EMA classifier"), ("head.", "projector"),
            ("momentum_head.", "EMA projector"), ("prototypes", "prototypes"), ("queue", "queue"),
            ("dino_loss_func.", "state of the loss"), ("decoder.", "decoder"),
        ),
        needs=("classifier.",),
        also_needs=(
            "projector.", "head.", "prototypes", "momentum_backbone.", "momentum_encoder.", "decoder.",
        ),
        cifar_padding=2, many_heads="fixed positions",
    ),
    Format(
        name="lightly benchmarks",
        online=_at("state_dict", "backbone.", "backbone.vit.", "student_backbone.vit."),
        ema=_at(
            "state_dict", "teacher_backbone.", "key_backbone.", "backbone_momentum.", "teacher_backbone.vit.",
        ),
        drop=(*_LIGHTLY_HEADS, *_LIGHTLY_VITS),
    ),
    Format(
        name="lightly benchmarks: DINO, older MoCo and TiCo",
        online=_at("state_dict", "student_backbone.", "query_backbone."),
        ema=_at("state_dict", "backbone."), drop=_LIGHTLY_HEADS,
        needs=("student_backbone.", "query_backbone."),
        note="in these `backbone` is the momentum branch",
    ),
    Format(
        name="lightly examples",
        online=_at("state_dict", "backbone.", "student_backbone."),
        ema=_at("state_dict", "backbone_momentum.", "teacher_backbone."),
        needs=("backbone.0.", "student_backbone.0."),
        drop=(*_LIGHTLY_HEADS, ("student_head", "projector"), ("teacher_head", "EMA projector")),
    ),
    Format(
        name="VISSL",
        online=(
            *_at("classy_state_dict.base_model.model.trunk", "_feature_blocks."),
            *_at("model_state_dict", "_feature_blocks."),
        ),
    ),
    Format(
        name="mmselfsup, mmpretrain",
        online=_at("state_dict", "backbone."),
        drop=(
            ("neck.", "projector"), ("head.", "head"), ("data_preprocessor.", "normalisation of images"),
            ("queue", "queue"),
        ),
        top="meta", cifar_padding=1,
    ),
    Format(
        name="mmselfsup, DenseCL and MoCo in training",
        online=_at("state_dict", "backbone.", "encoder_q.0."),
        ema=_at("state_dict", "encoder_k.0.", "encoder_k.module.0."),
        drop=(
            ("neck.", "projector"), ("head.", "head"), ("queue", "queue"), ("encoder_q.1.", "projector"),
            ("encoder_k.1.", "EMA projector"), ("backbone.fc.", "classifier"),
        ),
        needs=("encoder_q.", "encoder_k."), top="meta", cifar_padding=1,
    ),
    Format(
        name="InfoMin, InsDis, PIRL (PyContrast)",
        online=_at("model", "encoder."), ema=_at("model_ema", "encoder."),
        drop=(("head", "projector"), ("encoder.fc.", "classifier")),
    ),
    Format(
        name="ReSSL",
        online=_at("model", "encoder_q.net."), ema=_at("model", "encoder_k.net."),
        drop=(
            ("encoder_q.head.", "projector"), ("encoder_q.net.fc.", "projector"), ("queue", "queue"),
            ("encoder_k.head.", "EMA projector"), ("encoder_k.net.fc.", "EMA projector"),
        ),
    ),
    Format(
        name="stable-pretraining",
        online=_at("state_dict", "backbone.student.", "backbone."),
        ema=_at("state_dict", "backbone.teacher."),
        drop=(
            ("projector.", "projector"), ("predictor.", "predictor"), ("callbacks_", "probes"),
            ("backbone.base_ema_coefficient", "EMA schedule"), ("backbone.ema_coefficient", "EMA schedule"),
            ("backbone.final_ema_coefficient", "EMA schedule"),
        ),
        needs=("backbone.student.", "callbacks_", "projector."),
    ),
    Format(
        name="ReSA",
        online=_at("state_dict", "encoder."), ema=_at("state_dict", "momentum_encoder."),
        drop=(
            ("projector.", "projector"), ("predictor.", "predictor"),
            ("momentum_projector.", "EMA projector"),
        ),
        needs=("projector.",),
        note="ReSA's own evaluation uses the momentum encoder: --branch ema",
    ),
    Format(
        name="PixPro",
        online=_at("model", "encoder."), ema=_at("model", "encoder_k."),
        drop=(
            ("projector", "projector"), ("projector_k", "EMA projector"), ("predictor", "predictor"),
            ("projector_instance_k", "EMA projector"), ("value_transform", "pixel propagation"),
        ),
        needs=("projector_k.",),
    ),
    Format(
        name="VICRegL",
        online=_at("model", "backbone."),
        drop=(
            ("projector.", "projector"), ("maps_projector.", "projector of maps"),
            ("classifier.", "online classifier"),
        ),
        needs=("maps_projector.", "classifier."),
    ),
    Format(
        name="SupContrast",
        online=_at("model", "encoder."), drop=(("head.", "projector"),),
        needs=("encoder.layer2.0.shortcut.",), also_needs=("head.",), cifar_padding=1,
    ),
    Format(
        name="SimCLR (PyTorch), head in the place of fc",
        online=_at("state_dict", "backbone."), drop=(("backbone.fc.", "projector"),),
        needs=("backbone.fc.",),
    ),
    Format(
        name="SimCLR (PyTorch), f and g",
        online=_at("", "f."), drop=(("g.", "projector"), ("fc.", "classifier")), needs=("g.", "fc."),
        cifar_padding=1,
    ),
    Format(
        name="BYOL (PyTorch)",
        online=_at("", "online_encoder.net.", "online_encoder."),
        ema=_at("", "target_encoder.net.", "target_encoder."),
        drop=(
            ("online_predictor.", "predictor"), ("predictor.", "predictor"),
            ("online_encoder.projector.", "projector"), ("target_encoder.projector.", "EMA projector"),
            ("online_encoder.net.fc.", "classifier"), ("target_encoder.net.fc.", "classifier"),
            ("net.", "the online network once more"),
        ),
        needs=("online_encoder.",),
    ),
    Format(
        name="SeCo",
        online=_at("state_dict", "encoder_q."), ema=_at("state_dict", "encoder_k."),
        drop=(("heads_q.", "projector"), ("heads_k.", "EMA projector"), ("queue", "queue")),
        needs=("heads_q.",),
    ),
)  # fmt: skip

FOUND = Format(
    name="found by its layers",
    online=(),
    note="no known writer: found by its layers, all else in its container left out by name",
)
"""Not a writer: a complete network at a place of no known format."""

CMC = Format(
    name="CMC", online=_at("model", "encoder1."), drop=(("encoder2.", "network of the ab channels"),)
)
"""Tried so that it is recognised; its one input channel is refused."""

OWN = (OWN_RUN, OWN_BACKBONE, OWN_BACKBONE_EMA)
FORMATS: tuple[Format, ...] = (*OWN, *FOREIGN)

REFUSED = {
    "CMC": "its two networks see one and two channels of Lab, not RGB",
    "BYOL (DeepMind)": "a pickle of JAX arrays, which cannot be read without running code from it",
    "detectron2 (.pkl)": "`convert --reverse` makes a file of timm's names from it",
    "TorchScript": "a program; save its state_dict",
    "quantised weights": "give the float ones",
    "ResNets of other widths (w2, w4, w5)": "timm has none",
    "ViTs with a stem of several convolutions (MoCo v3's vit_conv)": "timm has none",
}
"""What is recognised and refused, and why."""
