"""The checkpoint formats that can be read, as data; `python -m transfer formats` prints them.

Keys are compared after every `module.` (DDP) and `_orig_mod.` (torch.compile) in them is taken out.
"""

from __future__ import annotations

import dataclasses

TORCHVISION_INDEX = (("0.", "conv1."), ("1.", "bn1."), ("4.", "layer1."), ("5.", "layer2."),
                     ("6.", "layer3."), ("7.", "layer4."))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where one branch lies: `container`, dotted keys into the loaded object ("" is the object), and `prefix`."""

    container: str
    prefix: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What one writer puts where. Every tensor beside the backbone must be named by `drop`."""

    name: str
    online: tuple[Place, ...]
    """Alternatives: a file has one of them."""
    ema: tuple[Place, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    """(prefix in the container, what it is): tensors that are no backbone."""
    needs: tuple[str, ...] = ()
    """Prefixes of which the container must hold one, where the names alone would fit other writers too."""
    rename: tuple[tuple[str, str], ...] = ()
    """(prefix, torchvision's prefix) inside the backbone."""
    cifar_padding: int | None = None
    """Effective padding of the writer's 3x3 stem; None: the writer has none, the usual 1 is assumed."""
    note: str = ""
    """What a user of the file should know."""


def _at(container: str, *prefixes: str) -> tuple[Place, ...]:
    return tuple(Place(container=container, prefix=prefix) for prefix in prefixes)


FC = ("fc.", "classifier")
BARE = tuple(Place(container=c, prefix="") for c in ("", "state_dict", "model", "model_state_dict"))

FORMATS: tuple[Format, ...] = (
    Format(
        name="torchvision or timm",
        online=BARE,
        ema=_at("state_dict_ema", ""),
        drop=(FC,),
        note="bare names: also the backbone files of Barlow Twins, VICReg and DINO",
    ),
    Format(
        name="INTL",
        online=_at("state_dict", "backbone."),
        ema=_at("state_dict", "momentum_backbone."),
        drop=(("projection.", "projector"), ("momentum_projection.", "EMA projector")),
        needs=("projection.", "momentum_projection."),
        cifar_padding=2,
        note="INTL's own evaluation uses the online branch",
    ),
    Format(
        name="MoCo v1, v2 or PCL",
        online=_at("state_dict", "encoder_q."),
        ema=_at("state_dict", "encoder_k."),
        drop=(("encoder_q.fc.", "projector"), ("encoder_k.fc.", "EMA projector"), ("queue", "queue of negatives")),
    ),
    Format(
        name="MoCo v3",
        online=_at("state_dict", "base_encoder."),
        ema=_at("state_dict", "momentum_encoder."),
        drop=(("base_encoder.fc.", "projector"), ("momentum_encoder.fc.", "EMA projector"),
              ("predictor.", "predictor")),
    ),
    Format(
        name="SimSiam",
        online=_at("state_dict", "encoder."),
        drop=(("encoder.fc.", "projector"), ("predictor.", "predictor")),
        needs=("encoder.fc.", "predictor."),
    ),
    Format(
        name="Barlow Twins or VICReg",
        online=_at("model", "backbone."),
        drop=(("projector.", "projector"), ("bn.", "normalisation of the embedding")),
    ),
    Format(
        name="SwAV, DeepCluster-v2 or SeLa-v2",
        online=BARE[:2],
        drop=(("projection_head", "projector"), ("prototypes", "prototypes")),
        needs=("projection_head", "prototypes"),
    ),
    Format(
        name="DINO",
        online=_at("student", "backbone."),
        ema=_at("teacher", "backbone."),
        drop=(("head.", "projection head"),),
        note="DINO's own evaluation uses the teacher: --branch ema",
    ),
    Format(
        name="solo-learn",
        online=_at("state_dict", "backbone.", "encoder."),
        ema=_at("state_dict", "momentum_backbone.", "momentum_encoder."),
        drop=(("projector.", "projector"), ("classifier.", "online classifier"), ("predictor.", "predictor"),
              ("momentum_projector.", "EMA projector"), ("momentum_classifier.", "EMA classifier"),
              ("backbone.fc.", "classifier"), ("encoder.fc.", "classifier")),
        cifar_padding=2,
    ),
    Format(
        name="lightly benchmarks",
        online=_at("state_dict", "backbone."),
        ema=_at("state_dict", "teacher_backbone.", "key_backbone.", "backbone_momentum."),
        drop=(("projection_head", "projector"), ("online_classifier.", "online classifier"),
              ("prediction_head", "predictor"), ("prototypes", "prototypes")),
    ),
    Format(
        name="lightly benchmarks, DINO",
        online=_at("state_dict", "student_backbone."),
        ema=_at("state_dict", "backbone."),
        drop=(("projection_head", "projector"), ("student_projection_head.", "projector"),
              ("online_classifier.", "online classifier"), ("criterion.", "centre of the loss")),
        needs=("student_backbone.",),
    ),
    Format(
        name="lightly examples",
        online=_at("state_dict", "backbone."),
        rename=TORCHVISION_INDEX,
        drop=(("projection_head", "projector"), ("prediction_head", "predictor")),
    ),
    Format(
        name="VISSL",
        online=(*_at("classy_state_dict.base_model.model.trunk", "_feature_blocks."),
                *_at("model_state_dict", "_feature_blocks.")),
    ),
    Format(
        name="mmselfsup or mmpretrain",
        online=_at("state_dict", "backbone."),
        drop=(("neck.", "projector"), ("head.", "head"), ("data_preprocessor.", "normalisation of the input")),
    ),
    Format(
        name="PyContrast (InfoMin, InsDis, PIRL)",
        online=_at("model", "encoder."),
        ema=_at("model_ema", "encoder."),
        drop=(("head.", "projector"), ("head_jig.", "projector"), ("encoder.fc.", "classifier")),
    ),
    Format(
        name="ReSSL",
        online=_at("model", "encoder_q.net."),
        ema=_at("model", "encoder_k.net."),
        drop=(("encoder_q.head.", "projector"), ("encoder_k.head.", "EMA projector"), ("queue", "queue"),
              ("encoder_q.net.fc.", "projector"), ("encoder_k.net.fc.", "EMA projector")),
    ),
    Format(
        name="stable-pretraining",
        online=_at("state_dict", "backbone.", "backbone.student."),
        ema=_at("state_dict", "backbone.teacher."),
        drop=(("projector.", "projector"),),
    ),
)  # fmt: skip


def table() -> list[dict[str, str]]:
    """One row a format: source, container, prefix of the online and the EMA branch, what is dropped."""

    def places(items: tuple[Place, ...]) -> str:
        return ", ".join(dict.fromkeys(p.prefix or "(bare)" for p in items))

    return [
        {
            "source": f.name,
            "container": ", ".join(dict.fromkeys(p.container or "none" for p in (*f.online, *f.ema))),
            "online": places(f.online),
            "EMA": places(f.ema),
            "dropped": ", ".join(prefix for prefix, _ in f.drop),
            "CIFAR padding": "" if f.cifar_padding is None else str(f.cifar_padding),
        }
        for f in FORMATS
    ]
