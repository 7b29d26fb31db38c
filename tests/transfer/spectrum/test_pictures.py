"""Pictures of spectra: no legend lies over a curve."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from transfer.spectrum import diagnosis_pictures, study_pictures


def checkpoint(name: str, step: int) -> dict[str, Any]:
    values = [1 / (i + 1) for i in range(64)]
    return {
        "name": name, "step": step, "layers": {f"layer{i}": values for i in (1, 2, 3, 4)},
        "by_images": {"100": {"rankme": 9.0}, "1000": {"rankme": 30.0}},
    }  # fmt: skip


FOUND = [checkpoint(f"checkpoint_epoch{i * 100}.pt of a long name", i) for i in range(1, 13)]
RUN = {
    "kind": "intl", "floor": 0.0,
    "log": [{"step": i, "loss": 9.0 - i, "condition_number": 10.0**i, "rankme": 5.0 + i} for i in range(5)],
}  # fmt: skip
GROUPS = {f"transformation {i}": [RUN] for i in range(20)}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: diagnosis_pictures._all(FOUND), lambda: diagnosis_pictures._layers(FOUND[:2]),
        lambda: diagnosis_pictures._by_images(FOUND), lambda: study_pictures._curves(GROUPS),
    ],
    ids=["spectra", "layers", "images", "curves"],
)  # fmt: skip
def test_no_legend_lies_over_a_curve(draw: Any) -> None:
    figure: Figure = draw()
    figure.canvas.draw()
    assert all(axes.get_legend() is None for axes in figure.axes)
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert not any(place.overlaps(axes.get_window_extent()) for axes in figure.axes if axes.get_visible())
    assert place.x1 <= figure.bbox.x1 and place.y0 >= 0  # all of it is on the picture
    plt.close(figure)
