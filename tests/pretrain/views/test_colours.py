"""Colour, blur and the rest: operations against torchvision's, distributions by counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F

from pretrain.data.datasets import open_dataset
from pretrain.views.augment import View, uniforms
from pretrain.views.colours import (
    _blur_by_sums,
    blend,
    draw_colours,
    finish,
    gaussian_blur,
    greyscale,
    shift_hue,
    solarise,
)
from pretrain.views.loader import FIRST_COLOUR_SLOT

HALF_LEVEL = 0.5 / 255
ZERO, ONE = torch.zeros(3), torch.ones(3)


@pytest.fixture(scope="module")
def real_N3HW(cifar_folder: Path) -> torch.Tensor:
    data = open_dataset("cifar10", cifar_folder, "test")
    pixels = np.stack([np.asarray(data.image(i)) for i in range(0, 160, 10)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_operations_equal_torchvision_on_real_images(real_N3HW: torch.Tensor) -> None:
    x = real_N3HW
    n = len(x)
    factor_N = torch.linspace(0.2, 1.8, n)
    none, all_ = torch.zeros(n), torch.ones(n)
    for shares, reference in (
        ((none, none), F.adjust_brightness),
        ((all_, none), F.adjust_saturation),
        ((none, all_), F.adjust_contrast),
    ):
        ours = x.clone()
        blend(ours, factor_N, *shares)
        theirs = torch.stack([reference(i, float(f)) for i, f in zip(x, factor_N)])
        assert (ours - theirs).abs().max() < 1e-5, reference.__name__
    turns_N = torch.linspace(-0.5, 0.5, n)
    theirs = torch.stack([F.adjust_hue(i, float(t)) for i, t in zip(x, turns_N)])
    assert (shift_hue(x, turns_N) - theirs).abs().max() < HALF_LEVEL
    assert (shift_hue(x, torch.zeros(n)) - x).abs().max() < 1e-5
    assert (greyscale(x) - F.rgb_to_grayscale(x)).abs().max() < 1e-6
    assert torch.equal(solarise(x), F.solarize(x, 128 / 255))
    sigma_N = torch.linspace(0.1, 2.0, n)
    theirs = torch.stack([F.gaussian_blur(i, [13, 13], [float(s)] * 2) for i, s in zip(x, sigma_N)])
    for ours in (gaussian_blur(x, sigma_N), _blur_by_sums(x, sigma_N, 6)):
        assert (ours - theirs).abs().max() < 1e-5


def test_the_whole_colour_step_equals_torchvision_image_by_image(real_N3HW: torch.Tensor) -> None:
    """With all probabilities at 1 the batched step is torchvision's functionals in each image's own order."""
    view = View(size=32, jitter_p=1, grey_p=0, blur_p=1, solarise_p=1, flip_p=1)
    n = len(real_N3HW)
    u = uniforms(5, 0, np.arange(n), 0)[:, FIRST_COLOUR_SLOT:]
    colours = draw_colours(u, view)
    crops = (real_N3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    ours = finish(crops, colours, mean=ZERO, std=ONE)
    orders = set()
    for i in range(n):
        x = real_N3HW[i]
        order = []
        for k in range(4):
            if colours.hue_4N[k, i]:
                x = F.adjust_hue(x, float(colours.turns_N[i]))
                order.append("hue")
            if k < 3:
                f = float(colours.blend_3N[k, i])
                name = "saturation" if colours.grey_share_3N[k, i] else "brightness"
                name = "contrast" if colours.mean_share_3N[k, i] else name
                x = getattr(F, f"adjust_{name}")(x, f)
                order.append(name)
        assert sorted(order) == ["brightness", "contrast", "hue", "saturation"]
        orders.add(tuple(order))
        x = F.gaussian_blur(x, [13, 13], [float(colours.sigma_N[i])] * 2)
        x = F.hflip(F.solarize(x, 128 / 255))
        differ = (ours[i] - x).abs() > 2 * HALF_LEVEL  # solarisation may tip at its threshold by rounding
        assert differ.float().mean() < 2e-3, order
    assert len(orders) > 5


def test_probability_zero_leaves_the_crop_and_one_changes_all(real_N3HW: torch.Tensor) -> None:
    real_N3HW = real_N3HW * torch.tensor([1.0, 0.8, 0.5])[:, None, None]  # grey images exist: give all a hue
    real_N3HW = (real_N3HW * 255).round() / 255
    crops = (real_N3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    u = uniforms(0, 0, np.arange(len(crops)), 0)[:, FIRST_COLOUR_SLOT:]
    never = View(size=32, jitter_p=0, grey_p=0, blur_p=0, solarise_p=0, flip_p=0)
    same = finish(crops, draw_colours(u, never), mean=ZERO, std=ONE)
    assert torch.allclose(same, real_N3HW, atol=1e-6)
    for name in ("jitter_p", "grey_p", "blur_p", "solarise_p", "flip_p"):
        always = dataclasses.replace(never, blur_sigma=(1.0, 2.0), **{name: 1.0})
        changed = finish(crops, draw_colours(u, always), mean=ZERO, std=ONE)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(changed, real_N3HW)), name


def test_probabilities_and_ranges_by_counts() -> None:
    n = 20_000
    view = View(size=32, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarise_p=0.1)
    colours = draw_colours(uniforms(1, 2, np.arange(n), 1)[:, FIRST_COLOUR_SLOT:], view)
    counts = {"grey": 0.2, "blur": 0.5, "solarise": 0.1, "flip": 0.5}
    for name, p in counts.items():
        spread = 4 * (n * p * (1 - p)) ** 0.5  # four binomial standard deviations
        assert abs(int(getattr(colours, f"{name}_N").sum()) - n * p) < spread, name
    jittered = int(colours.hue_4N.sum())
    assert abs(jittered - 0.8 * n) < 4 * (n * 0.16) ** 0.5
    assert all(abs(int(h.sum()) - jittered / 4) < 4 * (jittered * 3 / 16) ** 0.5 for h in colours.hue_4N)
    touched = colours.blend_3N != 1
    brightness = touched & (colours.grey_share_3N == 0) & (colours.mean_share_3N == 0)
    for chosen, strength in (
        (brightness, 0.4), (touched & (colours.mean_share_3N == 1), 0.3),
        (touched & (colours.grey_share_3N == 1), 0.2),
    ):  # fmt: skip
        f = colours.blend_3N[chosen]
        assert 1 - strength <= f.min() < 1 - 0.98 * strength and 1 + 0.98 * strength < f.max() <= 1 + strength
        assert abs(float(f.mean()) - 1) < 4 * strength / (3 * len(f)) ** 0.5
        assert (chosen.sum(1) > jittered / 4).all()  # each comes first, second and third about equally often
    assert colours.sigma_N.min() >= 0.1 and colours.sigma_N.max() <= 2.0
    assert abs(float(colours.turns_N.max()) - 0.1) < 1e-4 and abs(float(colours.turns_N.min()) + 0.1) < 1e-4


@pytest.mark.parametrize("side", [224, 192])
def test_the_number_of_threads_changes_nothing(side: int) -> None:
    """A loader's worker has one, the training process several; one such image fills a block alone."""
    pixels = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8)
    view = View(size=side, min_scale=0.2, jitter_p=1.0, blur_p=1.0, solarise_p=0.5)
    numbers = uniforms(0, 0, np.arange(5), 0)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(finish(pixels, draw_colours(numbers[:, FIRST_COLOUR_SLOT:], view), mean=mean, std=std))
    torch.set_num_threads(1)
    assert torch.equal(*found)


def test_a_compiler_takes_what_a_gpu_does_as_one_graph(real_N3HW: torch.Tensor) -> None:
    """In pieces it would be slower, and so many pieces that torch gives up and calls the rest."""
    n = len(real_N3HW)
    factor_N, share_N, sigma_N = torch.linspace(0.2, 1.8, n), torch.ones(n), torch.linspace(0.1, 2.0, n)

    def coloured(x: torch.Tensor) -> torch.Tensor:
        x = shift_hue(solarise(x), sigma_N / 4)
        blend(x, factor_N, share_N, 1 - share_N)
        return _blur_by_sums(x, sigma_N, 6)

    compiled = torch.compile(coloured, backend="eager", fullgraph=True)  # raises where it would stop
    torch.testing.assert_close(compiled(real_N3HW), coloured(real_N3HW), rtol=0, atol=1e-5)
