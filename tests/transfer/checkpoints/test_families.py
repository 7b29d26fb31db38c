"""Self-supervised ViTs and ConvNeXts of every format: read right, against a forward pass without timm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from pretrain.common.errors import UserError
from tests.helpers import plain_networks
from tests.helpers.checkpoint_zoo import head, lightning, pre, trainer
from transfer.checkpoints import formats
from transfer.checkpoints.backbone import load_backbone
from transfer.checkpoints.families import by_index
from transfer.checkpoints.families.match import on_paper

State = dict[str, Tensor]
SIDE = 32  # of the positions that these small files have, px
WIDTH = 192


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random values as large as in trained networks; windows on a few vectors, as in checkpoint_zoo."""
    pool = torch.randn(700_000, generator=torch.Generator().manual_seed(seed))
    scaled: dict[float, Tensor] = {}
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        n = torch.Size(shape).numel()
        size = 0.03 if len(shape) > 1 and n > 4000 else 0.2
        if size not in scaled:
            scaled[size] = pool * size
        state[key] = scaled[size][i * 97 : i * 97 + n].view(shape)
        if "norm" in key and key.endswith("weight"):
            state[key] = state[key] + 1
    return state


def vit(
    seed: int = 0, *, patch: int = 16, side: int = SIDE, classes: int = 1, registers: str = "",
    scaled: str = "", learned: bool = True, width: int = WIDTH,
) -> State:  # fmt: skip
    """A ViT-Ti's tensors under DINO's names."""
    grid, hidden = side // patch, 4 * width
    shapes: dict[str, tuple[int, ...]] = {}
    if classes:
        shapes["cls_token"] = (1, 1, width)
    shapes["pos_embed"] = (1, grid**2 + classes, width)
    if registers:
        shapes[registers] = (1, 4, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(12):
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        if scaled:
            block |= {scaled.format(1): (width,), scaled.format(2): (width,)}
        shapes |= {f"blocks.{i}.{k}": v for k, v in block.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    state = filled(shapes, seed)
    if not learned:
        state["pos_embed"] = torch.cat([torch.zeros(1, classes, width), state["pos_embed"][:, classes:]], 1)
    return state


def dinov3(seed: int = 0) -> State:
    state = vit(seed, scaled="ls{}.gamma", registers="storage_tokens")
    del state["pos_embed"]
    for i in range(12):
        mask = torch.ones(3 * WIDTH)
        mask[WIDTH : 2 * WIDTH] = 0
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    state["rope_embed.periods"] = (100.0 ** (torch.arange(16) / 16)).bfloat16()
    return state


def chunked(state: State) -> State:
    """Blocks as DINOv2's FSDP runs save them: `blocks.CHUNK.INDEX.`."""
    return {re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 6}.{m[1]}.", k): v
            for k, v in state.items()}  # fmt: skip


def convnext(seed: int = 0, *, grn: bool = False, gamma: bool = False, normed: bool = True) -> State:
    """An atto's tensors under the authors' names."""
    dims, depths = (40, 80, 160, 320), (2, 2, 6, 2)
    shapes: dict[str, tuple[int, ...]] = {
        "downsample_layers.0.0.weight": (40, 3, 4, 4), "downsample_layers.0.0.bias": (40,),
        "downsample_layers.0.1.weight": (40,), "downsample_layers.0.1.bias": (40,),
    }  # fmt: skip
    for i, (dim, depth) in enumerate(zip(dims, depths)):
        if i:
            start = f"downsample_layers.{i}."
            shapes |= {f"{start}0.weight": (dims[i - 1],), f"{start}0.bias": (dims[i - 1],)}
            shapes |= {f"{start}1.weight": (dim, dims[i - 1], 2, 2), f"{start}1.bias": (dim,)}
        for j in range(depth):
            block: dict[str, tuple[int, ...]] = {
                "dwconv.weight": (dim, 1, 7, 7), "dwconv.bias": (dim,), "norm.weight": (dim,),
                "norm.bias": (dim,), "pwconv1.weight": (4 * dim, dim), "pwconv1.bias": (4 * dim,),
                "pwconv2.weight": (dim, 4 * dim), "pwconv2.bias": (dim,),
            }  # fmt: skip
            if grn:
                block |= {"grn.gamma": (1, 1, 1, 4 * dim), "grn.beta": (1, 1, 1, 4 * dim)}
            if gamma:
                block["gamma"] = (dim,)
            shapes |= {f"stages.{i}.{j}.{k}": v for k, v in block.items()}
    if normed:
        shapes |= {"norm.weight": (320,), "norm.bias": (320,)}
    return filled(shapes, seed)


def sparse(state: State) -> State:
    """As FCMAE's pretraining holds them: MinkowskiEngine's kernels (taps, in, out), `ln` and `linear`."""
    found = {}
    for key, value in state.items():
        if key.endswith("dwconv.weight"):  # D x 1 x H x W, taps in order of columns
            found[key.replace("weight", "kernel")] = value[:, 0].transpose(1, 2).reshape(len(value), -1).T
        elif re.fullmatch(r"downsample_layers\.[123]\.1\.weight", key):
            found[key.replace("weight", "kernel")] = value.transpose(3, 2).flatten(2).permute(2, 1, 0)
        elif re.search(r"dwconv\.bias|downsample_layers\.[123]\.1\.bias", key):
            found[key] = value[None]
        elif re.search(r"stages.*(norm|pwconv\d)\.|downsample_layers\.[123]\.0\.", key):
            name, _, leaf = key.rpartition(".")
            found[f"{name}.{'linear' if 'pwconv' in name else 'ln'}.{leaf}"] = value
        else:
            found[key] = value.flatten()[None] if "grn" in key else value
    return found


A, B = vit(0), vit(1)
V2 = vit(0, patch=14, side=28, registers="register_tokens", scaled="ls{}.gamma")
FIXED = vit(0, learned=False)
IBOT = vit(0, scaled="gamma_{}")
BARE, BARE_B = vit(0, classes=0), vit(1, classes=0)
V3 = dinov3()
TOKEN = {"mask_token": torch.ones(1, WIDTH)}
DECODER = {"decoder_embed.weight": torch.ones(8, WIDTH), "decoder_blocks.0.norm1.weight": torch.ones(8)}
SMALL = vit(0, width=384)
SMALL_FIXED = vit(0, width=384, learned=False)


def first(tokens: list[Tensor]) -> Tensor:
    return tokens[-1][:, 0]


def mean(tokens: list[Tensor]) -> Tensor:
    return tokens[-1].mean(1)


Case = tuple[Any, str, dict[str, Any], Callable[[Tensor], Tensor]]


def case(
    value: Any, format_: str, state: State, heads: int = 3, pool: Any = first, eps: float = 1e-6, **asked: Any
) -> Case:
    return value, format_, asked, lambda images: pool(plain_networks.vit(state, images, heads=heads, eps=eps))


def cnn(value: Any, format_: str, state: State, norm_first: bool = False, **asked: Any) -> Case:
    return value, format_, asked, lambda images: plain_networks.convnext(state, images, norm_first=norm_first)


DINO = trainer(
    student=pre("module.backbone.", A) | head("module.head.mlp."), dino_loss={"center": torch.ones(1, 4)},
    teacher=pre("backbone.", B) | head("head.mlp."),
)  # fmt: skip
CNV2, CNL = convnext(grn=True), convnext()
FORMATS: dict[str, Case] = {
    "DINO, student": case(DINO, "DINO", A),
    "DINO, teacher": case(DINO, "DINO", B, branch="ema"),
    "DINO, backbone file": case(A, "timm, other networks", A),
    "iBOT": case(
        trainer(student=pre("module.backbone.", IBOT | {"masked_embed": torch.ones(1, WIDTH)})
                | head("module.head.mlp."), teacher=pre("backbone.", B), ibot_loss={"center": torch.ones(1)}),
        "iBOT", IBOT,
    ),
    "DINOv2, training": case(
        {"teacher": pre("backbone.", chunked(V2) | TOKEN) | head("dino_head.mlp.") | head("ibot_head.mlp.")},
        "DINOv2, DINOv3", V2, branch="ema",
    ),
    "DINOv2, backbone file": case(V2 | TOKEN, "DINOv2, DINOv3, backbone file", V2),
    "DINOv3, training": case(
        {"teacher": pre("backbone.", V3 | TOKEN) | head("dino_head.mlp.")}, "DINOv2, DINOv3", V3,
        branch="ema", eps=1e-5,
    ),
    "DINOv3, backbone file": case(V3 | TOKEN, "DINOv2, DINOv3, backbone file", V3, eps=1e-5),
    "MAE": case(trainer(model=FIXED | TOKEN | DECODER), "MAE", FIXED, heads=3),
    "MAE, fine-tuned": case(
        {"model": {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in A.items()}
         | {"head.weight": torch.ones(10, WIDTH), "head.bias": torch.ones(10)}},
        "timm, other networks", A,
        pool=lambda t: None,
    ),
    "MoCo v3": case(
        trainer(state_dict=pre("module.base_encoder.", SMALL_FIXED) | head("module.base_encoder.head.")
                | pre("module.momentum_encoder.", SMALL) | head("module.momentum_encoder.head.")
                | head("module.predictor.")),
        "MoCo v3", SMALL_FIXED, heads=12,
    ),
    "MSN": case(
        trainer(encoder=pre("module.", A) | head("module.fc.") | head("module.pred."),
                target_encoder=pre("module.", B) | head("module.fc."), prototypes=torch.ones(4, 8)),
        "MSN, I-JEPA", B, branch="ema",
    ),
    "I-JEPA": case(
        trainer(encoder=pre("module.", BARE), target_encoder=pre("module.", BARE_B),
                predictor={"module.predictor_embed.weight": torch.ones(8, WIDTH)}),
        "MSN, I-JEPA", BARE_B, pool=mean, branch="ema",
    ),
    "lightly, MAE": case(
        lightning(pre("backbone.vit.", A) | {"backbone.mask_token": torch.ones(1, 1, WIDTH)}
                  | pre("decoder.", {"mask_token": torch.ones(1, 1, 8)}) | head("prediction_head.")
                  | head("online_classifier.")),
        "lightly benchmarks", A,
    ),
    "lightly, DINOv2": case(
        lightning(pre("student_backbone.vit.", A) | {"student_backbone.mask_token": torch.ones(1, 1, WIDTH)}
                  | pre("teacher_backbone.vit.", B) | {"teacher_backbone.mask_token": torch.ones(1, 1, WIDTH)}
                  | head("student_head.dino_head.") | head("teacher_head.dino_head.")),
        "lightly benchmarks", B, branch="ema",
    ),
    "solo-learn, DINO": case(
        lightning(pre("backbone.", A) | pre("momentum_backbone.", B) | head("head.mlp.")
                  | head("momentum_head.mlp.") | head("classifier.") | head("momentum_classifier.")),
        "solo-learn", A,
    ),
    "solo-learn, MAE": case(
        lightning(pre("backbone.", FIXED) | pre("decoder.", {"mask_token": torch.ones(1, 1, 8)})
                  | head("classifier.")),
        "solo-learn", FIXED, heads=12,
    ),
    "ReSA": case(
        trainer(state_dict=pre("module.encoder.", A) | pre("module.momentum_encoder.", B)
                | head("module.projector.") | head("module.momentum_projector.") | head("module.predictor.")),
        "ReSA", B, branch="ema",
    ),
    "VICRegL": cnn(
        trainer(model=pre("module.backbone.", CNL) | head("module.projector.")
                | head("module.maps_projector.") | head("module.classifier.")),
        "VICRegL", CNL, norm_first=True,
    ),
    "VICRegL, backbone file": cnn(CNL, "timm, other networks", CNL, norm_first=True),
    "ConvNeXt": cnn({"model": convnext(gamma=True)}, "timm, other networks", convnext(gamma=True)),
    "ConvNeXt V2": cnn({"model": CNV2}, "timm, other networks", CNV2),
    "ConvNeXt V2, FCMAE": cnn(
        {"model": convnext(grn=True, normed=False)}, "timm, other networks",
        convnext(grn=True, normed=False),
    ),
    "ConvNeXt V2, FCMAE in training": cnn(
        trainer(model=pre("encoder.", sparse(convnext(grn=True, normed=False)))
                | {"mask_token": torch.ones(1, 8, 1, 1), "proj.weight": torch.ones(8, 320, 1, 1)}
                | {"pred.weight": torch.ones(8, 8, 1, 1), "decoder.0.norm.weight": torch.ones(8)}),
        "ConvNeXt V2, FCMAE in training", convnext(grn=True, normed=False),
    ),
}  # fmt: skip


def test_every_format_of_other_networks_has_a_file_here():
    of_others = {f.name for f in formats.FORMATS if f.families and "resnet" not in f.families}
    assert of_others <= {format_ for _, format_, _, _ in FORMATS.values()}


@pytest.mark.parametrize("name", FORMATS)
def test_features_are_those_of_a_plain_forward_pass(name: str, tmp_path: Path):
    value, format_, asked, wanted = FORMATS[name]
    file = tmp_path / "m.pth"
    torch.save(value, file)
    if name == "MAE":  # its small ViTs have as many heads as their writer chose
        with pytest.raises(UserError, match="--heads 3 or --heads 12"):
            load_backbone(file)
        asked = {"heads": 3}
    loaded = load_backbone(file, **asked)
    assert (loaded.format, loaded.branch) == (format_, asked.get("branch", "online"))
    side = int(loaded.weights["options"].get("img_size", SIDE))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        got = loaded.network().double()(images)
    if name == "MAE, fine-tuned":  # mean of the patches, then the norm
        tokens = plain_networks.vit(A, images, heads=3, norm=False)[-1][:, 1:].mean(1)
        expected = torch.nn.functional.layer_norm(
            tokens, (WIDTH,), A["norm.weight"].double(), A["norm.bias"].double(), 1e-6
        )
    else:
        expected = wanted(images)
    difference = float((got - expected).abs().max() / expected.abs().max())
    print(f"{name} | {loaded.arch} | {difference:.1e}")
    # registers: timm has class token and its position as one sum, rounded to float32
    assert difference < (1e-6 if "DINOv2" in name else 1e-9)


def answer(value: Any, tmp_path: Path, **asked: Any) -> str:
    torch.save(value, tmp_path / "m.pth")
    with pytest.raises(UserError) as told:
        load_backbone(tmp_path / "m.pth", **asked)
    return str(told.value)


def without(state: State, *keys: str) -> State:
    return {k: v for k, v in state.items() if k not in keys}


BROKEN: dict[str, tuple[Any, str]] = {
    "a missing layer": (without(A, "blocks.3.mlp.fc2.bias"), "missing: blocks.3.mlp.fc2.bias"),
    "a wrong shape": (
        A | {"blocks.3.norm1.weight": torch.ones(7)}, "wrong shape: blocks.3.norm1.weight is 7",
    ),
    "something left over": (A | {"adapter.weight": torch.ones(3)}, "adapter"),
    "a block too much": (A | {"blocks.0.extra.weight": torch.ones(3)}, "blocks.0.extra.weight"),
    "registers without any position": (
        without(V2, "pos_embed"), "a bias of keys",
    ),
    "positions that its writer computes": (without(A, "pos_embed"), "a ViT without positions"),
    "positions as a vector": (A | {"pos_embed": torch.ones(5)}, "have not the dimensions"),
    "a number for a matrix": (A | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, "have not the dimensions"),
    "periods as a number": (V3 | {"rope_embed.periods": torch.tensor(1.0)}, "have not the dimensions"),
    "channels": (A | {"patch_embed.proj.weight": torch.ones(WIDTH, 1, 16, 16)}, "1 channels instead of RGB"),
    "several convolutions before the blocks": (
        without(A, "patch_embed.proj.weight") | {"patch_embed.proj.0.weight": torch.ones(24, 3, 3, 3)},
        "a stem of several convolutions",
    ),
    "no usual size": (vit(width=96), "its number of heads is not known; --arch"),
    "CLIP's norm before the blocks": (
        without(A, "patch_embed.proj.bias")
        | {"norm_pre.weight": torch.ones(192), "norm_pre.bias": A["norm.bias"]},
        "quickgelu",
    ),
    "rotary positions of another base": (
        V3 | {"rope_embed.periods": 10.0 ** (torch.arange(16) / 16)}, "other periods than base 100",
    ),
    "a bias of keys": (
        {k: v for k, v in V3.items() if not k.endswith("bias_mask")}, "a bias of keys",
    ),
    "a ConvNeXt of no known size": (
        {k: v for k, v in CNL.items() if not k.startswith("stages.3.1.")}, "(2, 2, 6, 1) blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kin_is_refused_by_name(name: str, tmp_path: Path):
    value, words = BROKEN[name]
    assert words in answer(value, tmp_path)


def test_another_architecture_than_the_file_has_is_told(tmp_path: Path):
    assert "its backbone is a vit_tiny_patch16_224, not a resnet50" in answer(A, tmp_path, arch="resnet50")
    said = answer(A, tmp_path, arch="test_vit")
    assert "its backbone is a vit_tiny_patch16_224, not a test_vit" in said


@pytest.mark.parametrize("said", [{"heads": "many"}, {"positions": "nearest"}])
def test_metadata_that_no_one_can_go_by_are_told(said: dict[str, str], tmp_path: Path):
    own = {key: value.clone() for key, value in A.items()}
    save_file(own, tmp_path / "m.safetensors", {"format": "intl-bench/1", **said})
    with pytest.raises(UserError, match=f"its metadata say {next(iter(said))}"):
        load_backbone(tmp_path / "m.safetensors")


def test_what_a_file_cannot_tell_is_asked_for(tmp_path: Path):
    file = tmp_path / "m.pth"
    said = answer(SMALL_FIXED, tmp_path)  # as MoCo v3's with 12 heads, or MAE's with 6
    assert "--heads 6 or --heads 12" in said
    six, twelve = (load_backbone(file, heads=heads) for heads in (6, 12))
    assert "6 heads" in six.weights["network"] and "12 heads" in twelve.weights["network"]
    assert six.key != twelve.key
    images = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        one, other = (b.network().double()(images) for b in (six, twelve))
    assert not torch.allclose(one, other, rtol=1e-3)
    assert "--stem is for ResNets" in answer(A, tmp_path, stem="cifar")
    lite = timm.create_model("efficientnet_lite0", num_classes=0).state_dict()  # as tf_'s, padded otherwise
    assert "--arch efficientnet_lite0 or --arch tf_efficientnet_lite0" in answer(lite, tmp_path)
    torch.save({"arch": "tf_efficientnet_lite0", "state_dict": lite}, file)  # as timm's train.py writes it
    assert load_backbone(file).arch == "tf_efficientnet_lite0"


@pytest.mark.parametrize(
    ("arch", "asked", "side"),
    [
        ("test_efficientnet", {}, 32), ("tf_efficientnet_lite0", {"arch": "tf_efficientnet_lite0"}, 32),
        ("regnetx_002", {}, 32),
        ("test_vit", {"arch": "test_vit"}, 160),
        ("deit_tiny_distilled_patch16_224", {}, 32), ("vit_tiny_patch16_dinov3_qkvb", {}, 64),
        ("test_convnext", {"arch": "test_convnext"}, 32), ("test_vit2", {"arch": "test_vit2"}, 160),
    ],
)  # fmt: skip
def test_timms_own_files(arch: str, asked: dict[str, Any], side: int, tmp_path: Path):
    """Any network's own keys, with its classifier: features as by timm's forward_head, in float64."""
    torch.manual_seed(0)
    options = {"vit_tiny_patch16_dinov3_qkvb": {"global_pool": "token"}}
    options["deit_tiny_distilled_patch16_224"] = {"img_size": side}
    model = timm.create_model(arch, num_classes=7, **options.get(arch, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pth")
    loaded = load_backbone(tmp_path / "m.pth", **asked)
    assert loaded.arch == arch and loaded.format == "timm, other networks"
    assert set(loaded.dropped.values()) <= {"classifier"} and loaded.dropped
    model.reset_classifier(0)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.eval().double()(images)
        assert torch.equal(loaded.network().double()(images), wanted)


def test_torchvisions_vit(tmp_path: Path):
    """Its own file with its classifier, against its own forward pass; lightly has such backbones too."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 12, 3, WIDTH, 4 * WIDTH, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    loaded = load_backbone(tmp_path / "m.pth")
    assert set(loaded.dropped) == {"heads.head.weight", "heads.head.bias"}
    model.heads = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double().eval()(images)
        torch.testing.assert_close(loaded.network().double()(images), wanted, rtol=1e-9, atol=1e-9)


def test_a_network_that_reads_values_while_it_is_built_is_on_paper_too(monkeypatch: pytest.MonkeyPatch):
    def create(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Linear(*(torch.arange(1, 3) * 2).tolist())  # as timm's RegNets find their widths

    monkeypatch.setattr(timm, "create_model", create)
    network = on_paper("regnetx_002")
    assert {k: (*v.shape, v.device.type) for k, v in network.state_dict().items()} == {
        "weight": (4, 2, "meta"), "bias": (4, "meta")
    }  # fmt: skip


def test_the_index_is_what_timm_builds():
    """A few of its networks; `python -m transfer.checkpoints.families.by_index` writes it all."""
    names = ["efficientnet_lite0", "tf_efficientnet_lite0", "regnetx_002", "swin_tiny_patch4_window7_224"]
    index = by_index._index()
    for here, groups in by_index.written(names).items():
        assert [[n for n in group if n in names] for group in index[here]] == groups
