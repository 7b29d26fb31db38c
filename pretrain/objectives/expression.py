"""A transformation g(λ) written as an expression, such as `1/(λ+0.1)^0.5`: read, never run as code.

Loads without PyTorch, so that a wrong expression is told at once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("λ", "x")
FUNCTIONS = {"sqrt": 1, "exp": 1, "log": 1, "log1p": 1, "tanh": 1, "abs": 1, "min": 2, "max": 2, "clip": 3}
"""Each function and how many arguments it takes; clip(a, low, high)."""
OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "true_divide", ast.Pow: "pow"}
MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Expression:
    """g(λ) of a text over λ (or x), numbers, + − * / ^ and the functions of FUNCTIONS; ^ is a power, as **
    is.

    Called with eigenvalues it returns g of each. Raises ValueError for a text with anything else in it.
    """

    text: str
    tree: ast.expr = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(f"g(λ) of {len(self.text)} characters: at most {MOST_CHARACTERS} are read")
        try:
            tree = ast.parse(self.text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"g(λ) = {self.text!r} is no expression: {WANTED}") from None
        for node in _unknown(tree):
            part = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise ValueError(f"g(λ) = {self.text!r}: {part!r} is not known here: {WANTED}")
        object.__setattr__(self, "tree", tree)

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """g(λ) of each eigenvalue (M), same shape and dtype."""
        return _value(self.tree, eigenvalues).expand_as(eigenvalues)


def expression(text: str) -> Expression:
    """The transformation g(λ) that a text such as `1/(λ+0.1)^0.5` or `min(λ^-0.5, 10)` describes.

    Raises ValueError where it holds anything but λ (or x), numbers, + - * / ^ and sqrt, exp, log, log1p,
    tanh, abs, min, max, clip.
    """
    return Expression(text)


WANTED = f"write it with λ (or x), numbers, + - * / ^ and {', '.join(FUNCTIONS)}"


def _unknown(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a tree that may not stand in an expression; a function's name may in its call alone."""
    if not _is_known(node):
        yield node
        return
    for child in node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node):
        yield from _unknown(child)


def _is_known(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return FUNCTIONS.get(name) == len(node.args) and not node.keywords
    if isinstance(node, ast.Name):
        return node.id in NAMES
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.BinOp):
        return type(node.op) in OPERATORS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.USub, ast.UAdd))
    return isinstance(node, (ast.Load, ast.USub, ast.UAdd, *OPERATORS))


def _value(node: ast.expr, x: Tensor) -> Tensor:
    """The value of a checked node; numbers are tensors, so that Python's own arithmetic has no part in it."""
    import torch

    if isinstance(node, ast.Constant):
        return x.new_tensor(float(node.value))  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return x
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, x)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return getattr(torch, OPERATORS[type(node.op)])(_value(node.left, x), _value(node.right, x))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    values: list[Any] = [_value(a, x) for a in node.args]
    name = node.func.id
    if name == "clip":
        return torch.minimum(torch.maximum(values[0], values[1]), values[2])
    return getattr(torch, {"min": "minimum", "max": "maximum"}.get(name, name))(*values)
