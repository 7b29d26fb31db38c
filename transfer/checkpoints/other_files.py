"""What a file without a network that can be judged is instead, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.checkpoints.families.resnet import VOLUMES, fitting_others

if TYPE_CHECKING:
    from transfer.checkpoints.search import Container, Network

IN_PYTHON = (
    "any module that maps images to features can be judged from Python, whatever its file: "
    "transfer.evaluate(module, ...) (docs/python.md)"
)
"""The way on for what is none of timm's networks, which alone are read from files."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".pkl")


def folder_is(path: Path) -> str:
    """What a folder of weights holds, as the end of a sentence about it."""
    names = sorted(p.name for p in path.iterdir())
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "is a distributed checkpoint of PyTorch, in pieces: join them with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} whole.pth`, then give whole.pth"
        )
    if "latest" in names or any(name.endswith("_model_states.pt") for name in names):
        return (
            "is a DeepSpeed checkpoint: join it with the zero_to_fp32.py beside it, then give "
            "the file that it writes"
        )
    if "saved_model.pb" in names or any(name.endswith(".index") for name in names):
        return (
            "is a TensorFlow checkpoint; convert it to PyTorch's names and layout, and save with torch.save"
        )
    pieces = [name for name in names if "-of-" in name]
    if pieces:
        return (
            f"holds a model in {len(pieces)} pieces ({pieces[0]} ...): join them into one file, such as by "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size='100GB')"
        )
    files = [name for name in names if Path(name).suffix in WEIGHT_SUFFIXES]
    return f"is a folder; name the weight file in it{': ' if files else ''}{', '.join(files[:5])}"


def what_else(path: Path, head: bytes) -> str:
    """What the file looks like instead, by its first bytes and its name, and what to do."""
    if not head:
        return "it is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` in its repository"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, so the download went wrong; fetch the file itself"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it, or if PyTorch 0.1 wrote it, save it again with a newer one"
    for start, name, tool in _PACKED:
        if head.startswith(start):
            return f"it is packed with {name}; unpack it with `{tool}` and give what comes out"
    if head.startswith(b"\x89HDF") or path.suffix in (".h5", ".hdf5", ".keras"):
        return (
            "it is an HDF5 file, as Keras writes: convert its kernels (HWIO) to PyTorch's (OIHW) under "
            "torchvision's names and save them with torch.save"
        )
    if path.suffix == ".onnx" or b"pytorch" in head[:64] or b"onnx" in head[:64]:
        return (
            "it is an ONNX graph, in which BatchNorm is mostly folded away; give the checkpoint that it was "
            "exported from"
        )
    if path.suffix in (".msgpack", ".flax"):
        return "it is Flax's msgpack; convert it to PyTorch's names and layout, and save with torch.save"
    if path.suffix == ".distcp":
        return "it is one piece of a distributed checkpoint; name its folder, and the way on is told"
    if path.suffix == ".safetensors":
        return "its safetensors header is damaged or cut off; download it again"
    if head.startswith(b"\x93NUMPY"):
        return "it is a single NumPy array; give the checkpoint with all of them"
    with open(path, "rb") as file:
        start_of_text = file.read(1_000_000)
    try:
        said = json.loads(start_of_text)
    except ValueError:
        if head.lstrip()[:1] != b"{":
            return "neither safetensors nor written by torch.save; download it again if it should be"
        return "it begins like a JSON file; name the weight file beside it"
    if isinstance(said, dict) and "weight_map" in said:
        return "it is the index of a model in several pieces; join them into one file and give that"
    return "it is a JSON file; name the weight file beside it"


_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2"), (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"), (b"7z\xbc\xaf", "7-Zip", "7z x"),
    (b"Rar!", "RAR", "unrar x"),
)  # fmt: skip


def what_instead(raw: Any, held: list[Container], network: Network | None = None) -> str:
    """What a file without a complete network holds, and the way on; "" where its own faults say it."""
    names = [name for container in held for name in container.names.values()]
    for words, said in _PACKINGS:
        if any(word in placeholder for placeholder in raw.placeholders for word in words):
            return said
    if network is not None and network.match.reason:
        return IN_PYTHON
    if network is not None and network.family != "resnet":
        return f"where it is another network, --arch with timm's name reads it, or {IN_PYTHON}"
    if network is not None:
        shapes = {target: tuple(tensor.shape) for target, tensor in network.tensors.items()}
        others = fitting_others(shapes)
        if others:
            return f"`--arch {others[0]}` works"
        if not any(target.endswith("running_mean") for target in shapes):
            return (
                "it has no BatchNorm statistics: a GroupNorm ResNet, of which timm has resnet50_gn alone, or "
                f"saved without buffers; {IN_PYTHON}"
            )
    for parts, told in _TOWERS:
        if any(part in name for name in names for part in parts):
            return told
    if network is not None:
        return f"where it is another network, {IN_PYTHON}"
    value = raw.value
    if isinstance(value, dict) and ("experiment_state" in value or "target_params" in value):
        return (
            "it is DeepMind's BYOL pickle, whose arrays are rebuilt by functions that the file names. In a "
            "sandbox, unpickle it with JAX and dm-haiku, take online_params and online_state, permute the "
            "HWIO kernels by (3, 2, 0, 1) and save the arrays under torchvision's names with torch.save"
        )
    if not names:
        what = ", ".join(f"{str(k)[:40]!r}" for k in list(value)[:8]) if isinstance(value, dict) else ""
        return (
            f"there are no tensors in it{f', only {what}' if what else ''}; give the file with the weights, "
            "mostly the largest beside it"
        )
    dimensions = [tensor.dim() for container in held for tensor in container.tensors.values()]
    kernels = dimensions.count(4)
    if 5 in dimensions and not kernels:
        return f"{VOLUMES}; {IN_PYTHON}"
    shown = ", ".join(names[:3])
    return (
        f"{len(names)} tensors, {kernels} of them convolutions ({shown} ...), none named as a ResNet's "
        "blocks (layer1.0.conv1.weight), a ViT's or a ConvNeXt's. If it is a ResNet under other names, say "
        "which in a YAML layout, --weights-format FILE.yaml (docs/reading_checkpoints.md); if not, "
        f"{IN_PYTHON}"
    )


_PACKINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("DTensor", "ShardedTensor", "_sharded_tensor"),
     "its tensors are sharded over ranks (DTensor): join them first, for example with "
     "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True on the ranks "
     "that wrote it"),
    (("_rebuild_qtensor", "torch.ao.nn.quantized", "torch.nn.quantized", "_packed_params"),
     "it is quantised; give the float checkpoint that it was made from"),
    (("_rebuild_sparse_tensor",), "its tensors are sparse; save them dense (tensor.to_dense())"),
)  # fmt: skip
_TOWERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("attnpool.",), "it is CLIP's ResNet, with three stem convolutions and attention pooling, which is none "
     f"of timm's plain ResNets; {IN_PYTHON}"),
    (("attn.qkv", "self_attention.in_proj", "attention.attention.query", "cls_token"),
     f"it is a vision transformer under names that are neither timm's nor its authors'; {IN_PYTHON}"),
    (("dwconv.", ".gamma"),
     f"it is a ConvNeXt under names that are neither timm's nor its authors'; {IN_PYTHON}"),
    (("trunk_output.", ".b1.conv", "s1.b1."), f"it is a RegNet, not under timm's names; {IN_PYTHON}"),
    (("res2.0.conv1", "bottom_up."), "it is a detectron2 file: `python -m transfer convert --reverse "
     "--weights FILE --output backbone.safetensors` makes one that can be judged"),
    (("_blocks.0._depthwise", "features.18.", "_expand_conv"),
     f"it is a MobileNet or EfficientNet, not under timm's names; {IN_PYTHON}"),
)  # fmt: skip
