"""The pretrainings of a suite: one, several seeds of it, or each value of a sweep."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.common.errors import UserError
from pretrain.common.files import file_name

MOST_PRETRAININGS = 1000
LONGEST_NAME = 200  # a file system takes 255 bytes, of which links and locks need some
SWEPT = re.compile(r"([A-Za-z][\w-]*)=(.+)")
COMMA = re.compile(r",(?![^(\[]*[)\]])")
"""One that is not inside brackets."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """One run of the recipe."""

    seed: int
    varied: tuple[tuple[str, str], ...] = ()
    """Swept options by name, and this run's values."""
    seeds: int = 1
    """How many seeds there are."""

    @property
    def words(self) -> tuple[str, ...]:
        """The swept options as they are typed."""
        return tuple(word for name, value in self.varied for word in (f"--{name.replace('_', '-')}", value))

    @property
    def place(self) -> str:
        """Its folder below pretrain/: lr=0.1/seed1; empty where it is the only one."""
        parts = [self.setting] if self.varied else []
        return "/".join([*parts, f"seed{self.seed}"] if self.seeds > 1 else parts)

    @property
    def setting(self) -> str:
        """The swept values, as a row's label and a folder have them."""
        return ",".join(f"{name}={file_name(value)}" for name, value in self.varied)


def pretrainings(first_seed: int, seeds: int, sweep: Sequence[str]) -> list[Pretraining]:
    """Every combination of the swept values, with every seed. Raises UserError for what is no sweep."""
    options: dict[str, list[str]] = {}
    for word in sweep:
        match = SWEPT.fullmatch(word.strip())
        values = [v.strip() for v in COMMA.split(match[2])] if match else []
        if match is None or not all(values):
            raise UserError(f"--sweep {word}: wanted OPTION=VALUE,VALUE, such as lr=0.1,0.3")
        if match[1] in options or len(set(map(_number, values))) < len(values):
            raise UserError(f"--sweep {word}: {match[1]} or one of its values comes twice")
        options[match[1]] = values
    if (count := math.prod(map(len, options.values())) * seeds) > MOST_PRETRAININGS:
        asked = f"--sweep and --pretrain-seeds ask for {count:,} pretrainings"
        raise UserError(f"{asked}; {MOST_PRETRAININGS} are the most")
    chosen = [tuple(zip(options, values)) for values in itertools.product(*options.values())]
    found = [
        Pretraining(seed=seed, varied=varied, seeds=seeds)
        for varied in chosen
        for seed in range(first_seed, first_seed + seeds)
    ]
    if longest := next((p.setting for p in found if len(p.setting) > LONGEST_NAME), ""):
        raise UserError(f"--sweep: {longest[:80]}... would be a folder; its name is too long for one")
    return found


def _number(value: str) -> float | str:
    """What tells values apart: 0.1 and 0.10 are one."""
    try:
        return float(value)
    except ValueError:
        return value
