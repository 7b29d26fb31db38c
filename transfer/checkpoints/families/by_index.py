"""Other networks of timm's under timm's own keys, by an index of keys and shapes (`timm_index.json`).

`python -m transfer.checkpoints.families.by_index` writes the index anew from the installed timm. What it says
is checked against the built network each time, so that of another version of timm it can only say too little.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer.checkpoints.families.match import (
    COUNTER,
    Match,
    Shape,
    compare,
    is_model,
    on_paper,
    timm_shapes,
)

INDEX = Path(__file__).with_name("timm_index.json")
MODULES = (
    "regnet", "efficientnet", "mobilenetv3", "swin_transformer", "swin_transformer_v2", "xcit", "beit",
    "deit", "eva", "cait", "densenet",
)  # fmt: skip
"""timm's modules whose networks are in the index."""
PLACE = re.compile(
    r"(?P<prefix>(?:.*[./:])?)(?:conv_stem|stem\.conv|patch_embed\.proj(?:\.0\.0)?|features\.conv0)\.weight"
)
OWN = re.compile(r"(?!head\.|head_dist\.|classifier\.|fc\.)")
_SIZED = frozenset((
    "img_size", "grid_size", "num_patches", "feat_size", "input_resolution", "output_resolution", "seq_len",
    "ref_feat_shape", "feature_info", "pretrained_cfg", "default_cfg", "fused_attn", "training",
    "drop_prob", "p",
))  # fmt: skip
"""Attributes of modules that hang on the images' size or change nothing in evaluation."""


def digest(shapes: Mapping[str, Shape]) -> str:
    """16 hexadecimal digits of the keys and shapes, counters apart."""
    lines = sorted(
        f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items() if not key.endswith(COUNTER)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def match(shapes: Mapping[str, Shape], *, arch: str | None = None) -> Match:
    """The network of timm's with exactly these keys and shapes; `arch`: as the user says."""
    if arch is not None:
        return compare(shapes, timm_shapes(arch), arch)
    groups = [[name for name in group if is_model(name)] for group in _index().get(digest(shapes), [])]
    groups = [group for group in groups if group]
    if not groups:
        return Match(
            arch=None, reason="no network whose keys and shapes are known; --arch with timm's name reads any"
        )
    found = compare(shapes, timm_shapes(groups[0][0]), groups[0][0])
    if len(groups) == 1 or found.faults:
        return found
    names = " or ".join(f"--arch {group[0]}" for group in groups[:6])
    question = f"several of timm's networks have these keys and compute otherwise: say {names}"
    return compare(shapes, timm_shapes(groups[0][0]), groups[0][0], question=question)


@functools.cache
def _index() -> dict[str, list[list[str]]]:
    return json.loads(INDEX.read_text(encoding="utf-8"))


def forward_digest(model: Any) -> str:
    """Of what a network computes beside its parameters: the kinds of its modules and their plain settings."""
    found = []
    for name, module in model.named_modules():
        plain = {
            key: repr(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _SIZED
            and isinstance(value, (int, float, str, bool, tuple, list))
        }  # fmt: skip
        found.append((name, type(module).__name__, sorted(plain.items())))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def written(names: list[str]) -> dict[str, list[list[str]]]:
    """Index of timm's networks `names`: digest of keys and shapes -> names that compute alike, in groups."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        model = on_paper(name)
        here = digest({key: tuple(value.shape) for key, value in model.state_dict().items()})
        found.setdefault(here, {}).setdefault(forward_digest(model), []).append(name)
    return {here: list(groups.values()) for here, groups in sorted(found.items())}


def main() -> None:
    """Write the index of MODULES."""
    import timm

    names = sorted({name for module in MODULES for name in timm.list_models(module=module)})
    lines = [f"{json.dumps(here)}: {json.dumps(groups)}" for here, groups in written(names).items()]
    INDEX.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
