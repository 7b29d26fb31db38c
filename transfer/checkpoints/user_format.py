"""A user's own checkpoint format, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import Any

from pretrain.common.errors import UserError
from pretrain.common.files import read_yaml
from transfer.checkpoints.format import Format, Place

FIELDS = ("name", "online", "ema", "drop", "needs", "also_needs", "rename", "cifar_padding", "note")


def read_user_format(path: str | Path) -> Format:
    """The format that `--weights-format FILE.yaml` describes. Raises UserError naming the field.

    online, ema: a list of {container, prefix}; drop, rename: mappings; needs, also_needs: lists of prefixes.
    """
    try:
        said = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--weights-format {path}: cannot be read ({error})") from error
    if not isinstance(said, dict) or not said.get("online", said.get("ema")):
        raise UserError(
            f"--weights-format {path}: wanted a YAML mapping with `online` or `ema`, a list of places, such "
            "as [{container: state_dict, prefix: model.resnet.}]"
        )
    unknown = sorted(map(str, set(said) - set(FIELDS)))
    if unknown:
        raise UserError(
            f"--weights-format {path}: unknown {', '.join(unknown)}; there are {', '.join(FIELDS)}"
        )
    padding = said.get("cifar_padding")
    if padding is not None and (not isinstance(padding, int) or not 0 <= padding <= 8):
        raise UserError(f"--weights-format {path}: cifar_padding {short(padding)}: wanted 0 to 8 px")
    for name in ("name", "note"):
        if not isinstance(said.get(name, ""), str):
            raise UserError(f"--weights-format {path}: {name}: wanted text")
    return Format(
        name=said.get("name", Path(path).stem),
        online=_places(said, "online", path),
        ema=_places(said, "ema", path),
        drop=_pairs(said, "drop", path),
        rename=_pairs(said, "rename", path),
        needs=_texts(said, "needs", path),
        also_needs=_texts(said, "also_needs", path),
        cifar_padding=padding,
        note=said.get("note", ""),
    )


def _places(said: dict[str, Any], name: str, path: str | Path) -> tuple[Place, ...]:
    places = said.get(name) or []
    fits = isinstance(places, list) and all(
        isinstance(p, dict)
        and set(p) <= {"container", "prefix"}
        and all(isinstance(v, str) for v in p.values())
        for p in places
    )
    if not fits:
        raise UserError(
            f"--weights-format {path}: {name}: wanted a list of places, each {{container: ..., prefix: ...}}"
        )
    return tuple(Place(p.get("container", ""), p.get("prefix", "")) for p in places)


def _pairs(said: dict[str, Any], name: str, path: str | Path) -> tuple[tuple[str, str], ...]:
    pairs = said.get(name) or {}
    if not isinstance(pairs, dict) or not all(isinstance(v, str) for item in pairs.items() for v in item):
        wanted = "beginning of a key: what it is" if name == "drop" else "beginning: torchvision's name"
        raise UserError(f"--weights-format {path}: {name}: wanted a mapping, {wanted}")
    return tuple(pairs.items())


def _texts(said: dict[str, Any], name: str, path: str | Path) -> tuple[str, ...]:
    texts = said.get(name) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"--weights-format {path}: {name}: wanted a list of beginnings of keys")
    return tuple(texts)
