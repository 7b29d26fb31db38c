"""The name of a detection config enters; its file leaves. Apart, as this needs no detectron2."""

from __future__ import annotations

from pathlib import Path

from pretrain.cli import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "detection_configs"


def find_config(file: str | Path) -> Path:
    """The file, also when named as in detection_configs/ (with or without .yaml)."""
    for path in (Path(file), CONFIGS / file, CONFIGS / f"{file}.yaml", CONFIGS / Path(file).name):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("Base")))
    raise UserError(f"--config-file {file}: no such file; known names: {known}")
