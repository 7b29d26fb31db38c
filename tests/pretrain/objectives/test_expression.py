"""g(λ) written as a text: what it computes, and that nothing else in a text is ever run."""

from __future__ import annotations

import pytest
import torch

from pretrain.objectives.expression import Expression, expression
from pretrain.objectives.spectral import power, spectral_transform, zca
from tests.pretrain.objectives.test_intl import views_of


@pytest.mark.parametrize(
    ("text", "at_two"),
    [
        ("1/(λ+0.1)^0.5", 2.1**-0.5), ("1 / (x + 0.1) ** 0.5", 2.1**-0.5), ("2*λ^2", 8.0), ("-λ^-1",
        -0.5), ("min(λ^-0.5, 0.3)", 0.3), ("max(1, λ)", 2.0), ("clip(λ, 0, 1)", 1.0), ("3", 3.0),
        ("λ^2^0.5", 2 ** 2**0.5), ("sqrt(λ)/+λ", 2**-0.5), ("exp(-λ) + log(λ)*tanh(1)", 0.1353352832 +
        0.6931471806 * 0.7615941560), ("-abs(-log1p(x))", -1.0986122887),
    ],
)  # fmt: skip
def test_values(text: str, at_two: float) -> None:
    x = torch.tensor([2.0, 0.5, 2.0], dtype=torch.float64)
    values = expression(text)(x)
    assert values.shape == x.shape and values.dtype == x.dtype
    assert values[[0, 2]].tolist() == pytest.approx([at_two, at_two], rel=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "λ.sum()", "open", "sqrt", "λ if 1 else 2", "[λ]", "λ[0]",
        "eval(λ)", "lambda x: x", "y", "sqrt(λ, 2)", "min(λ)", "sqrt(x=λ)", "λ @ λ", "λ // 2", "not λ",
        "λ < 1", "'a'", "1j", "True", "", "1 +", "(" * 200 + "λ" + ")" * 200, "λ" + "+1" * 200,
        "min(*[λ, λ])", "(λ := 1)", "f'{λ}'", "λ; λ", "min(λ, sqrt)", "sqrt(sqrt)",
    ],
)  # fmt: skip
def test_what_else_a_text_may_say_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"g\(λ\)"):
        Expression(text)


@pytest.mark.parametrize("whitening", ["channel", "batch"])
def test_transforms_as_the_function_does(whitening) -> None:
    z = views_of(24, 70, 2)[0]
    weights = views_of(24, 70, 2, seed=1)[1].detach()
    for text, g in (("λ^-0.5", zca()), ("λ**-0.4", power(0.4))):
        ours, expected = (spectral_transform(z, f, whitening=whitening) for f in (expression(text), g))
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad((y * weights).sum(), z)[0] for y in (ours, expected)]
        torch.testing.assert_close(*grads)
    clipped = spectral_transform(z, expression("min(λ^-0.5, 1)"), whitening=whitening)
    assert torch.isfinite(torch.autograd.grad((clipped * weights).sum(), z)[0]).all()
