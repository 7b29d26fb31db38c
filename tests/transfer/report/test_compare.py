"""What may be said about differences: values by hand and by scipy; false alarms counted by simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.helpers.report_data import record, write_lines
from transfer.report.evidence.collect import collect
from transfer.report.evidence.compare import Summary, Trial, binomial_error, compare
from transfer.report.evidence.grouping import group
from transfer.report.evidence.pairs import MOST_SHOWN, _raw_p, compared, leading
from transfer.report.evidence.significance import SIGNIFICANCE, holm, margin, p_values
from transfer.report.pages.statements import differences, verdict


def of(
    checkpoints: Mapping[str, Sequence[float]], *, images: int = 10_000, proportion: bool = True,
    seeds: bool = True, fixed: bool = False,
) -> Summary:  # fmt: skip
    """Each checkpoint's value by evaluation seed; "" for runs without a weights file."""
    trials = [
        Trial(value=v, images=images, seed=i if seeds else None, weights=w, fixed=fixed)
        for w, values in checkpoints.items()
        for i, v in enumerate(values)
    ]
    return Summary(trials=tuple(trials), proportion=proportion)


def pretrainings(*values: float, name: str = "a", **rest: bool) -> Summary:
    return of({f"{name}{i}": [v] for i, v in enumerate(values)}, **rest)  # type: ignore[arg-type]


# means and spreads


def test_mean_and_sample_standard_deviation() -> None:
    # 80, 82, 84: mean 82, squared deviations 4 + 0 + 4 over n − 1 = 2: variance 4
    for summary in (of({"a": [80.0, 82.0, 84.0]}), pretrainings(80.0, 82.0, 84.0)):
        assert (summary.mean, summary.std, summary.n) == (82.0, 2.0, 3)


def test_a_checkpoint_counts_once() -> None:
    # a: 81, b: 85, whatever the number of their seeds: mean 83, standard deviation sqrt(4 + 4) = 2.828
    summary = of({"a": [80.0, 81.0, 82.0], "b": [85.0]})
    assert (summary.mean, summary.n, summary.count) == (83.0, 2, "n 2, of 4 runs")
    assert summary.std == pytest.approx(math.sqrt(8))
    assert of({"": [80.0, 84.0]}).n == 2  # random weights are drawn anew by every run


def test_binomial_error_of_a_single_run() -> None:
    # p = 0.8, 10,000 images: sqrt(0.8 * 0.2 / 10,000) = 0.004
    assert of({"a": [80.0]}).binomial_error == pytest.approx(0.4)
    assert of({"a": [80.0]}).std is None
    assert of({"a": [14.0]}, proportion=False).binomial_error is None  # AP is no proportion
    assert binomial_error(100.0, 50) == 0.0


# one comparison


def test_welch_by_hand() -> None:
    # a = 80, 82, 84 (s² = 4, n = 3), b = 70, 71 (s² = 0.5, n = 2): difference 11.5,
    # standard error sqrt(4/3 + 0.5/2) = sqrt(19/12) = 1.2583, t = 9.139,
    # df = (19/12)² / ((4/3)²/2 + (1/4)²/1) = 2.5069 / (0.88889 + 0.0625) = 2.635
    found = compare(pretrainings(80, 82, 84), pretrainings(70, 71, name="b"))
    assert found.points == pytest.approx(11.5)
    assert "Welch t test over 3 pretrainings and 2 pretrainings: t = 9.14, df = 2.6" in found.reason
    assert found.verdict == "beyond noise"


def test_without_an_error_of_the_images_it_is_scipys_welch_test() -> None:
    a, b = (30.1, 30.9, 31.4, 29.8), (28.0, 30.3, 29.1)
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    found = compare(pretrainings(*a, proportion=False), pretrainings(*b, name="b", proportion=False))
    assert f"t = {test.statistic:.2f}, df = {test.df:.1f}, p = {test.pvalue:.3g}" in found.reason
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert found.spread == f"95 % CI {low:+.2f} to {high:+.2f}"


def test_equal_evaluation_seeds_are_scipys_paired_test() -> None:
    a, b = (31.0, 32.0, 33.5), (30.2, 31.4, 32.6)
    test = stats.ttest_rel(a, b)
    found = compare(of({"a": a}, proportion=False), of({"b": b}, proportion=False))
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert found.verdict == "beyond the noise of the seeds"
    assert "paired t test over 3 evaluation seeds" in found.reason
    apart = of({"b": [*b, 31.0]}, proportion=False)  # a seed that the other has not
    assert "Welch" in compare(of({"a": a}, proportion=False), apart).reason


def test_the_errors_of_images_and_of_pretraining_add_up() -> None:
    # 75 and 77 % of 10,000 images: binomial variances 0.1875 and 0.1771, together 0.3646. Over pretrainings
    # 74.9, 75.1 and 76.9, 77.1: s² = 0.02 each, variance of the difference 0.02, df = 2, t = 4.3027.
    # Half width: sqrt(4.3027² · 0.02 + 1.95996² · 0.3646) = sqrt(0.3703 + 1.4006) = 1.3307
    found = compare(pretrainings(76.9, 77.1), pretrainings(74.9, 75.1, name="b"))
    assert found.spread == "95 % CI +0.67 to +3.33"
    assert found.verdict == "beyond noise"
    few = compare(pretrainings(76.9, 77.1, images=100), pretrainings(74.9, 75.1, name="b", images=100))
    assert few.verdict == "within noise"


def test_seeds_of_two_pretrainings_are_not_six_pretrainings() -> None:
    # over the means 75.0, 76.4 and 74.0, 75.0: t = 1.2 / sqrt(0.49 + 0.25) = 1.39
    a = {"a": [74.9, 75.0, 75.1], "b": [76.3, 76.4, 76.5]}
    b = {"c": [73.9, 74.0, 74.1], "d": [74.9, 75.0, 75.1]}
    naive = stats.ttest_ind([*a["a"], *a["b"]], [*b["c"], *b["d"]], equal_var=False)
    right = stats.ttest_ind([75.0, 76.4], [74.0, 75.0], equal_var=False)
    assert naive.pvalue < 0.02 and right.pvalue > 0.29
    found = compare(of(a), of(b))
    assert f"t = 1.39, df = 1.8, p = {right.pvalue:.3g}" in found.reason and found.verdict == "within noise"


def test_one_checkpoint_a_side_never_speaks_for_pretraining() -> None:
    # 75.6 against 75.0 of 50,000: standard errors 0.192 and 0.194, together 0.273: 2.2 of them, p = 0.028
    found = compare(of({"a": [75.6]}, images=50_000), of({"b": [75.0]}, images=50_000), ("INTL", "SwAV"))
    assert found.verdict == "beyond the noise of the test images"
    assert "p = 0.0278" in found.reason
    assert "the spread over pretraining is unknown for INTL and SwAV" in found.reason
    assert "the spread over seeds is unknown for INTL and SwAV" in found.reason
    several = compare(pretrainings(75.6, 75.8, 76.0), of({"b": [70.0, 70.1]}), ("INTL", "SwAV"))
    assert several.verdict == "beyond the noise of the test images and one side's pretrainings and the seeds"
    assert "Welch t test over 3 pretrainings and 2 seeds" in several.reason
    alone = compare(pretrainings(75.6, 75.8, 76.0), of({"b": [70.0]}, seeds=False))
    assert alone.verdict == "beyond the noise of the test images and one side's pretrainings"
    assert "the spread over pretraining is unknown for SwAV" in several.reason


def test_seeds_without_spread_are_bounded_by_the_images() -> None:
    # 60 and 50 % of 10,000: sqrt(0.24 + 0.25) = 0.70; 10 points are 14 of them, 1 point is 1.4
    same = of({"b": [50.0, 50.0]})
    assert (
        compare(of({"a": [60.0, 60.0]}), same).verdict == "beyond the noise of the test images and the seeds"
    )
    assert (
        compare(of({"a": [51.0, 51.0]}), same).verdict == "within the noise of the test images and the seeds"
    )


def test_no_test_without_spread_or_with_single_ap() -> None:
    single, two = of({"a": [14.0]}, proportion=False), of({"b": [6.0, 7.0]}, proportion=False)
    found = compare(single, two)
    assert found.verdict == "cannot be told" and "n = 1 against 2" in found.reason
    still = compare(of({"a": [14.0, 14.0]}, proportion=False), of({"b": [6.0, 6.0]}, proportion=False))
    assert still.verdict == "cannot be told" and "no spread among 2 and 2 runs" in still.reason
    # 0.1 + 0.2 is not 0.3 in binary: that is no spread either; without pairs, Welch's test is left
    rounded = compare(of({"a": [0.3, 9.3]}, proportion=False), of({"b": [0.2, 9.2]}, proportion=False))
    assert "Welch" in rounded.reason and rounded.verdict == "within the noise of the seeds"


def test_raw_pixels_are_a_constant() -> None:
    # nothing about them is random: one-sample test of 84, 85, 86 against 80: t = 5 / (1 / sqrt(3)) = 8.66
    pixels = of({"": [80.0]}, seeds=False, fixed=True)
    found = compare(pretrainings(84, 85, 86), pixels)
    assert found.verdict == "beyond noise" and "t = 8.66, df = 2.0, p = 0.0131" in found.reason
    # by k-NN one random network has no seed either, but another draw of it differs
    assert compare(pretrainings(84, 85, 86), of({"b": [80.0]}, seeds=False)).verdict != "beyond noise"


# several comparisons


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (not below), 0.06 (0.04 raised)
    found = holm(np.array([0.03, 0.01, np.nan, 0.04, 0.02]))
    assert found == pytest.approx([0.06, 0.04, np.nan, 0.06, 0.06], nan_ok=True)
    assert holm(np.array([0.3])) == [0.3] and holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_arrays_say_what_single_comparisons_say() -> None:
    """Pairs of all kinds of sides: p of the arrays is that of `compare`, untested pairs are the same."""
    rng = np.random.default_rng(0)
    sides = [of({"raw": [80.5]}, seeds=False, fixed=True), of({"": [70.0, 71.0]})]
    for i in range(24):
        runs, seeds = [(1, 1), (1, 3), (3, 1), (2, 2)][i % 4]
        values = {f"{i}-{r}": list(rng.normal(75, 0.5, seeds).round(1)) for r in range(runs)}
        sides.append(of(values, proportion=i % 3 > 0, images=[500, 10_000][i % 2]))
    found = _raw_p(sides)
    single = [compare(a, b).p for i, a in enumerate(sides) for b in sides[i + 1 :]]
    assert found == pytest.approx([math.nan if p is None else p for p in single], nan_ok=True, rel=1e-9)
    assert 0 < np.isnan(found).sum() < len(found) / 2


def test_p_is_the_level_at_which_the_margin_is_the_difference() -> None:
    rng = np.random.default_rng(0)
    points, variance, df, image = (10 ** rng.uniform(-1.5, 0.5, 400) for _ in range(4))
    p = p_values(points, variance, df, image)
    for one in range(400):
        at = margin(variance[one], df[one], image[one], p[one])
        assert at == pytest.approx(points[one], rel=1e-8)
    assert p_values(1.96, 0.0, math.inf, 1.0) == pytest.approx(0.0499958, rel=1e-5)  # of any table
    assert p_values(2.776, 1.0, 4, 0.0) == pytest.approx(0.05, rel=1e-3)
    assert (p_values(0.0, 1.0, 4, 1.0), p_values(90.0, 0.0, math.inf, 0.001)) == (1.0, 1e-300)


def test_of_many_methods_only_those_against_the_first_are_shown(tmp_path: Path) -> None:
    means = {f"m{i}": 60 + i / 4 for i in range(MOST_SHOWN)}
    some = differences(_results(tmp_path, **means))[1]
    assert some is not None and len(some.rows) == (MOST_SHOWN - 1) * (MOST_SHOWN - 2) // 2
    first, others = differences(_results(tmp_path, **means, best=90.0))
    assert others is None and first is not None and len(first.rows) == MOST_SHOWN
    assert f"over {MOST_SHOWN * (MOST_SHOWN + 1) // 2} comparisons" in first.rows[0][6].text
    assert f"more than {MOST_SHOWN} methods" in first.note and f"more than {MOST_SHOWN}" not in some.note


def _results(tmp_path: Path, **means: float):  # type: ignore[no-untyped-def]
    for i, (label, mean) in enumerate(means.items()):
        line = record("INTL", "knn", {"top1_k20": mean})
        line |= {"label": label, "weights": {"path": label, "sha256": f"{i:064d}", "branch": "online"}}
        write_lines(tmp_path / label / "results.jsonl", [line])
    return group(collect([tmp_path]))


def test_bold_is_shared_by_all_within_noise_of_the_best(tmp_path: Path) -> None:
    # 10,000 images, standard errors about 0.37 each, 0.52 of a difference
    results = _results(tmp_path, a=84.0, b=83.8, c=80.0)
    (task,) = results.tasks
    assert leading(results, task) == {"a", "b"}
    bold = [row[0].text for row in verdict(results).rows if row[1].kind == "best"]
    assert bold == ["a", "b"]
    p = {pair: d.p for pair, d in compared(results, task).items()}
    assert p["a", "b"] > 0.05 and max(p["a", "c"], p["b", "c"]) < 1e-8  # type: ignore[operator,type-var]


def test_nothing_is_bold_where_all_are_within_noise(tmp_path: Path) -> None:
    results = _results(tmp_path, a=84.0, b=83.8)
    assert leading(results, results.tasks[0]) == frozenset()
    assert not [row for row in verdict(results).rows if row[1].kind == "best"]


def test_a_sentence_says_how_many_comparisons_were_made(tmp_path: Path) -> None:
    # 1.1 points of 84 %: 2.1 standard errors, p = 0.034: alone beyond the images' noise, as one of three not
    alone, none = differences(_results(tmp_path / "two", a=84.0, b=82.9))
    assert alone is not None and none is None
    assert [c.text for c in alone.rows[0][3:6:2]] == ["+1.10", "beyond the noise of the test images"]
    three, others = differences(_results(tmp_path / "three", a=84.0, b=82.9, c=83.5))
    assert three is not None and others is not None
    assert [[c.text for c in row[1:4]] for row in three.rows] == [["a", "c", "+0.50"], ["a", "b", "+1.10"]]
    assert [[c.text for c in row[1:4]] for row in others.rows] == [["c", "b", "+0.60"]]
    assert three.rows[1][5].text == "within the noise of the test images"
    assert "by Holm over 3 comparisons of the task" in three.rows[1][6].text


# false alarms and power

DESIGNS = {"1 x 5": (1, 5), "2 x 3": (2, 3), "3 x 3": (3, 3), "5 x 1": (5, 1)}
"""Pretrainings a side, and evaluation seeds of each."""
IMAGES = 50_000


def draw(
    rng: np.random.Generator, draws: int, design: tuple[int, int], sd: tuple[float, float],
    truth: float = 0.0, images: int = IMAGES,
) -> np.ndarray:  # fmt: skip
    """Figures, draws x side x pretraining x seed, `truth` points apart, at a true top-1 of 75 %."""
    (between, within), image = sd, binomial_error(75.0, images)
    shape = (draws, 2, *design)
    figures = 75.0 + rng.normal(0, image, (draws, 2, 1, 1)) + rng.normal(0, between, (*shape[:3], 1))
    figures[:, 0] += truth
    return figures + rng.normal(0, within, shape)


def claims(figures: np.ndarray, images: int = IMAGES) -> np.ndarray:
    """Whether each draw is called beyond noise over pretrainings: the test anew, on arrays."""
    means = figures.mean(3)
    n = means.shape[2]
    if n == 1:
        return np.zeros(len(means), bool)
    side = means.var(2, ddof=1) / n
    variance = side.sum(1)
    df = variance**2 / (side**2 / (n - 1)).sum(1)
    p = means.mean(2) / 100
    image = (1e4 * p * (1 - p) / images).sum(1)
    return np.abs(np.subtract(*means.mean(2).T)) > margin(variance, df, image)


def summaries(figures: np.ndarray) -> tuple[Summary, Summary]:
    sides = [
        of({f"{side}{i}": list(row) for i, row in enumerate(rows)}, images=IMAGES)
        for side, rows in enumerate(figures)
    ]
    return sides[0], sides[1]


@pytest.mark.parametrize("sd", [(0.5, 0.05), (0.5, 0.5), (0.05, 0.5), (0.1, 0.1), (2.0, 0.05), (0.0, 0.05)])
def test_false_alarms_are_rare(sd: tuple[float, float]) -> None:
    """Under no true difference at most 7 % of draws are called beyond noise; of 1 x n none ever is."""
    rng = np.random.default_rng(0)
    for name, design in DESIGNS.items():
        figures = draw(rng, 20_000, design, sd)
        called = claims(figures)
        assert called.mean() <= (0.0 if design[0] == 1 else 0.07), name
        for one, said in zip(figures[:40], called):  # the report's own way to the same answer
            assert (compare(*summaries(one)).verdict == "beyond noise") == said


def test_the_simulation_would_see_seeds_taken_for_pretrainings() -> None:
    """The broken version beside it: Welch over all values calls a third of draws without difference real."""
    figures = draw(np.random.default_rng(0), 4000, (2, 3), (0.5, 0.05)).reshape(4000, 2, 6)
    p = stats.ttest_ind(figures[:, 0], figures[:, 1], axis=1, equal_var=False).pvalue
    assert (p < 0.05).mean() > 0.3


def test_power() -> None:
    """A true difference is found as often as a t test of that many pretrainings can find it.

    Where the images have no error it is Welch's test, as scipy has it; with three pretrainings or more that
    comes near the non-central t distribution with 2 (n − 1) degrees of freedom.
    """
    rng = np.random.default_rng(0)
    sd = (0.5, 0.05)
    for name, design in DESIGNS.items():
        n, seeds = design
        for truth in (1.0, 2.0, 4.0):
            real = 100 * claims(draw(rng, 10_000, design, sd, truth)).mean()
            figures = draw(rng, 10_000, design, sd, truth, 10**12)
            exact = 100 * claims(figures, 10**12).mean()
            print(
                f"{name}, {truth:g} points: found in {real:.0f} % of draws, by exact figures in {exact:.0f} %"
            )
            if n == 1:
                assert real == exact == 0
                continue
            means = figures.mean(3)
            welch = stats.ttest_ind(means[:, 0], means[:, 1], axis=1, equal_var=False).pvalue
            assert exact == pytest.approx(100 * (welch < 0.05).mean(), abs=0.1) and real <= exact + 1
            if n > 2:
                shift = truth / math.sqrt(2 / n * (sd[0] ** 2 + sd[1] ** 2 / seeds))
                critical = stats.t.isf(0.025, 2 * (n - 1))
                theory = 100 * float(stats.nct.sf(critical, 2 * (n - 1), shift))
                assert theory - 12 <= exact <= theory + 2, (name, truth, theory)


def test_false_alarms_of_a_whole_table_are_rare() -> None:
    """Four methods, six comparisons: by Holm, any false claim in at most 7 % of tables; unadjusted, more."""
    rng = np.random.default_rng(0)
    tables, raw, corrected = 100, 0, 0
    for _ in range(tables):
        values = rng.normal(75.0, 0.5, (4, 5))
        methods = [pretrainings(*row, name=str(i), images=10**7) for i, row in enumerate(values)]
        p = np.array([compare(a, b).p for i, a in enumerate(methods) for b in methods[i + 1 :]])
        raw += bool((p < SIGNIFICANCE).any())
        corrected += bool((holm(p) < SIGNIFICANCE).any())
    assert corrected / tables <= 0.07 < 0.12 < raw / tables
