"""Steps as a checked graph, with a key for each: a hash of all that decides its result."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from transfer.__main__ import COMMANDS


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the suite with its options, what it waits for and what it leaves behind."""

    name: str
    """Unique; spelt like its output folder under the suite's own: knn/intl."""
    kind: str
    """Names the resources it asks for: pretrain, knn, linear ..."""
    command: str
    """What a user types after `python -m`: "transfer knn", "pretrain", "transfer.train_net"."""
    argv: tuple[str, ...]
    """Paths of the user are absolute; relative ones are the project's own and mean the pinned code."""
    output: Path
    """Folder the command writes to, with its progress.json and results.jsonl."""
    depends_on: tuple[str, ...] = ()
    """Steps that must have succeeded."""
    after: tuple[str, ...] = ()
    """Steps that must have ended, however: the report's."""
    inputs: tuple[Path, ...] = ()
    """The user's files whose content decides the result: weights, a recipe."""
    makes: tuple[Path, ...] = ()
    """Files that must be there when the step is done; without them it is not."""

    @property
    def shell(self) -> str:
        """What to type in a shell for the same."""
        return f"python -m {self.command} {shlex.join(self.argv)}"

    @property
    def module(self) -> str:
        """Where its `main(argv) -> int | None` is today."""
        package, _, name = self.command.partition(" ")
        if name:
            return COMMANDS[name][0]
        return f"{package}.__main__" if package == "pretrain" else package

    def keyed(self, needed: Mapping[str, str]) -> str:
        """Hash of the command, the input files' content and the keys of the steps it depends_on.

        The command as users know it, not the module behind it: a suite under way outlives a move of code.
        """
        content = {
            "command": self.command,
            "argv": self.argv,
            "inputs": {str(p): sha256_of(p) for p in self.inputs if p.is_file()},
            "depends_on": {name: needed[name] for name in self.depends_on},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Graph:
    """Steps in an order in which each comes after all it waits for."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps: dict[str, Step] = {}
        for step in steps:
            if step.name in self.steps:
                raise ValueError(f"two steps are named {step.name}")
            for other in (*step.depends_on, *step.after):
                if other not in self.steps:
                    raise ValueError(f"{step.name} waits for {other}, which no earlier step is named")
            self.steps[step.name] = step
        self.keys: dict[str, str] = {}
        for step in steps:
            self.keys[step.name] = step.keyed(self.keys)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps.values())

    def __len__(self) -> int:
        return len(self.steps)

    def downstream(self, names: set[str]) -> set[str]:
        """`names` and every step that needs one of them, however far down."""
        found = set(names)
        for step in self:
            if found.intersection(step.depends_on):
                found.add(step.name)
        return found

    def forced(self, wanted: list[str]) -> set[str]:
        """The steps that `--force` names mean: a step, a kind, or a folder of steps, and what needs them."""
        found: set[str] = set()
        for word in wanted:
            hits = {s.name for s in self if word in (s.name, s.kind) or s.name.startswith(f"{word}/")}
            if not hits:
                kinds = sorted({s.kind for s in self})
                raise UserError(
                    f"--force {word}: no such step; steps: {', '.join(self.steps)}; kinds: {', '.join(kinds)}"
                )
            found |= hits
        return self.downstream(found)
