"""`transfer protocols`: list the protocols, print one with every key explained, check one of your own."""

from __future__ import annotations

import dataclasses
import importlib
import textwrap
from typing import Any

import yaml
from docstring_parser import parse_from_object

from pretrain.common.cli import Parser
from pretrain.common.errors import UserError
from transfer.evaluation.protocol import Protocol, all_protocols, as_markdown, load_protocol

VALUES = {
    "knn": ("transfer.evaluators.knn", "KnnProtocol"),
    "linear": ("transfer.evaluators.linear_protocol", "LinearProtocol"),
    "semisup": ("transfer.evaluators.finetune_protocol", "FineTuneProtocol"),
    "spectrum": ("transfer.spectrum.diagnosis", "SpectrumProtocol"),
}
"""The class of each task's values: its module, which loads PyTorch, and its name."""
DESCRIPTION = """List the evaluation protocols.

show NAME@VERSION prints one with every key explained, as a file: under a name of its own, such as
mine@1.yaml, it is a protocol of yours. check FILE says whether such a file is one, and how it differs.
"""
WIDTH = 100


def values_of(task: str) -> type:
    """The dataclass of a task's values."""
    module, name = VALUES[task]
    return getattr(importlib.import_module(module), name)


def explained(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, and of those that it is made from."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        found |= {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(one).params}
    return found


def as_file(protocol: Protocol) -> str:
    """The protocol's file with each key explained, and below the keys that it leaves at their defaults."""
    cls = values_of(protocol.task)
    docs = explained(cls)
    lines = [f"# {protocol}, hash {protocol.hash}"]
    said = {name: getattr(protocol, name) for name in ("task", "title", "source", "differs")}
    for name, value in said.items():
        lines += [_yaml(name, value)] if value else []
    lines += ["values:"]
    for key, value in protocol.values.items():
        lines += [*_comment(docs[key], "  "), textwrap.indent(_yaml(key, value), "  ")]
    rest = [f for f in dataclasses.fields(cls) if f.name not in protocol.values]
    lines += ["  # --- not in this file, and so at their defaults:"] if rest else []
    for field in rest:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        lines += [*_comment(docs[field.name], "  "), f"  # {_yaml(field.name, default)}"]
    return "\n".join(lines)


def _yaml(key: str, value: Any) -> str:
    said: dict[str, Any] = {"width": 10**6, "allow_unicode": True, "sort_keys": False}
    if isinstance(value, (list, dict)):
        return f"{key}: {yaml.safe_dump(value, default_flow_style=True, **said)}".rstrip()
    return yaml.safe_dump({key: value}, default_flow_style=False, **said).rstrip()


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def checked(file: str) -> str:
    """What a user's file is, and what it changes of the nearest of ours. Raises UserError naming a fault."""
    if not file.endswith((".yaml", ".yml")):
        raise UserError(f"protocols check {file}: wanted a YAML file, NAME@VERSION.yaml")
    protocol = load_protocol(file)
    protocol.settings(values_of(protocol.task))
    told = f"{protocol}: a protocol of task {protocol.task}, hash {protocol.hash}"
    near = {str(p): _differing(protocol, p) for p in all_protocols() if p.task == protocol.task}
    name = min(near, key=lambda n: len(near[n]))
    changes = "; ".join(near[name]) or "nothing"
    told += f"\nnearest of the project's own: {name}, from which it differs in {changes}"
    copied = [
        key for key in ("title", "source") if getattr(protocol, key) == getattr(load_protocol(name), key)
    ]
    if copied and near[name]:
        are = "are" if len(copied) > 1 else "is"
        told += f"\nits {' and '.join(copied)} {are} {name}'s, and reports will print that: say what yours is"
    return told


def _differing(one: Protocol, other: Protocol) -> list[str]:
    def spelt(p: Protocol, key: str) -> str:
        return f"{p.values[key]}" if key in p.values else "its default"

    keys = dict.fromkeys([*one.values, *other.values])
    return [f"{k}: {spelt(one, k)}, there {spelt(other, k)}"
            for k in keys if one.values.get(k, ...) != other.values.get(k, ...)]  # fmt: skip


def main(argv: list[str]) -> int:
    """`python -m transfer protocols [show NAME | check FILE]`."""
    parser = Parser(prog="python -m transfer protocols", description=DESCRIPTION)
    parser.add_argument("words", nargs="*", metavar="show NAME@VERSION | check FILE", help="See above.")
    parser.add_argument("--markdown", action="store_true", help="All of them as Markdown tables.")
    arguments = parser.parse_args(argv)
    words = arguments.words
    if arguments.markdown and not words:
        print(as_markdown())
    elif not words:
        for p in all_protocols():
            print(f"{p.task:8s} {p!s:32s} {p.title}")
    elif len(words) == 2 and words[0] == "check":
        print(checked(words[1]))
    elif len(words) == 1 or (len(words) == 2 and words[0] == "show"):
        print(as_file(load_protocol(words[-1])))
    else:
        raise UserError(f"protocols {' '.join(words)}: wanted show NAME@VERSION or check FILE")
    return 0
