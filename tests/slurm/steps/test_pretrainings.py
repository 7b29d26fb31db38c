"""Several pretrainings in one suite: seeds of one, values of a sweep, and which are one method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.common.errors import UserError
from pretrain.common.word_lists import spread
from slurm.commands.suite import LISTS
from slurm.steps.graph import Step
from slurm.steps.pretrainings import pretrainings
from slurm.steps.resources import load_profile
from slurm.steps.suite import Suite, suite_graph
from transfer.report.evidence.labels import named
from transfer.report.evidence.records import Record


def steps(root: Path, **asked: Any) -> dict[str, Step]:
    given = {"recipe": "cifar10_two_cores", "tasks": ["knn", "linear"], "data_dir": str(root), **asked}
    suite = Suite(output=str(root / "out"), **given)
    return {s.name: s for s in suite_graph(root / "out", suite, load_profile("local", []))}


def value(step: Step, option: str) -> str:
    """What the command takes: the last of several."""
    at = max(i for i, word in enumerate(step.argv) if word == option)
    return step.argv[at + 1]


def test_a_single_pretraining_stands_where_it_always_did(tmp_path: Path) -> None:
    found = steps(tmp_path, control=True, pretrain_seed=3)
    assert [*found] == [
        "pretrain", "control", "knn/intl", "linear/intl/seed0", "knn/control", "linear/control/seed0",
        "report",
    ]  # fmt: skip
    assert value(found["pretrain"], "--seed") == value(found["control"], "--seed") == "3"
    assert value(found["knn/intl"], "--label") == "INTL" and value(found["knn/intl"], "--branch") == "online"
    assert found["pretrain"].output == tmp_path / "out" / "pretrain"


def test_seeds_of_pretraining_are_one_method(tmp_path: Path) -> None:
    found = steps(tmp_path, pretrain_seeds=3, pretrain_seed=1, control=True, tasks=["knn"])
    trained = [s for s in found.values() if s.kind == "pretrain"]
    assert [(s.name, value(s, "--seed")) for s in trained] == [
        ("pretrain/seed1", "1"), ("pretrain/seed2", "2"), ("pretrain/seed3", "3"),
    ]  # fmt: skip
    assert [s.output.relative_to(tmp_path / "out") for s in trained] == [Path(s.name) for s in trained]
    judged = found["knn/intl-seed2"]
    assert judged.depends_on == ("pretrain/seed2",) and value(judged, "--weights").startswith(
        str(trained[1].output)
    )
    labels = {name: value(s, "--label") for name, s in found.items() if s.kind == "knn"}
    assert labels == {
        **{f"knn/intl-seed{i}": "INTL" for i in (1, 2, 3)},
        **{f"knn/control-seed{i}": "random control" for i in (1, 2, 3)},
    }
    assert {value(s, "--seed") for s in found.values() if s.kind == "control"} == {"1", "2", "3"}


def test_a_sweep_is_every_combination_with_its_evaluations(tmp_path: Path) -> None:
    found = steps(
        tmp_path, sweep=["lr=0.1,0.3", "weight-decay=1e-6,1e-5"], pretrain_seeds=2, tasks=["knn"],
        pretrain_options="--lr 0.9", label="mine", control=True,
    )  # fmt: skip
    trained = [s for s in found.values() if s.kind == "pretrain"]
    assert len(trained) == 8
    assert {(value(s, "--lr"), value(s, "--weight-decay"), value(s, "--seed")) for s in trained} == {
        (lr, decay, seed) for lr in ("0.1", "0.3") for decay in ("1e-6", "1e-5") for seed in "01"
    }
    one = found["knn/intl-lr=0.3,weight-decay=1e-6-seed1"]
    assert one.depends_on == ("pretrain/lr=0.3,weight-decay=1e-6/seed1",)
    assert value(one, "--label") == "mine lr=0.3,weight-decay=1e-6"
    assert len([s for s in found.values() if s.kind == "control"]) == 2  # untrained, so one a seed


def test_what_is_no_sweep(tmp_path: Path) -> None:
    for sweep, said in (
        (["lr"], "wanted OPTION=VALUE,VALUE"),
        (["lr=0.1,"], "wanted OPTION=VALUE,VALUE"),
        (["lr=0.1", "lr=0.2"], "comes twice"),
        (["lr=0.1,0.1"], "comes twice"),
        (["lrr=1"], "unrecognized arguments: --lrr"),
        (["lr=fast"], "--lr fast: wanted"),
    ):
        with pytest.raises(UserError, match=said):
            steps(tmp_path, sweep=sweep)
    for more, said in (
        ({"pretrain_seeds": 0}, "--pretrain-seeds 0: wanted 1 to 1000"),
        ({"pretrain_seeds": 1_000_000}, "--pretrain-seeds 1000000: wanted 1 to 1000"),
        ({"seeds": 10**9}, "--seeds 1000000000: wanted 1 to 1000"),
        ({"pretrain_seeds": 600, "sweep": ["lr=1,2"]}, "ask for 1,200 pretrainings; 1000 are the most"),
        ({"sweep": ["lr=0.1,0.10"]}, "or one of its values comes twice"),
        ({"sweep": ["lr=1e-1,0.1"]}, "or one of its values comes twice"),
        ({"sweep": ["output=" + "x" * 90, "label=" + "y" * 90, "stem=" + "z" * 90]}, "too long for one"),
        ({"recipe": None, "weights": ["w"], "sweep": ["lr=1"]}, "go with --recipe"),
        ({"recipe": None, "weights": ["w"], "pretrain_seeds": 2}, "go with --recipe"),
    ):
        with pytest.raises(UserError, match=said):
            steps(tmp_path, **more)


def test_as_it_is_typed() -> None:
    words = spread(["--sweep", "lr=0.1,0.3", "stem=cifar", "--sweep", "epochs=1,2,lr2=3"], LISTS)
    assert words == ['--sweep=["lr=0.1,0.3", "stem=cifar", "epochs=1,2", "lr2=3"]']
    assert [p.place for p in pretrainings(0, 1, [])] == [""]
    wide, deep = pretrainings(0, 1, ["transform=min(λ^-0.5, 10),min(λ^-0.5, 20)"])
    assert wide.words == ("--transform", "min(λ^-0.5, 10)") and deep.words[1] == "min(λ^-0.5, 20)"
    assert wide.place != deep.place and wide.place.isascii()
    sizes = pretrainings(0, 1, ["view_sizes=[32,32],[40,40]"])
    assert [p.words[1] for p in sizes] == ["[32,32]", "[40,40]"]


def test_files_have_the_labels_that_the_report_gives_them(tmp_path: Path) -> None:
    """A suite's rows are named like those of single commands without --label."""
    places = ("moco.pth.tar", "a/checkpoint.pt", "b/x.pth", "c/x.pth")
    for place in places:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(place.encode())
    files = [str(tmp_path / place) for place in places]
    found = steps(tmp_path, recipe=None, weights=files, tasks=["knn"])
    labels = [value(s, "--label") for s in found.values() if s.kind == "knn"]
    records = [
        Record(values={"weights": {"path": f, "sha256": f, "branch": "online"}}, folder=tmp_path, root=0)
        for f in files
    ]
    assert labels == [r.label for r in named(records)] == ["moco", "a/checkpoint", "b/x", "c/x"]


def test_a_label_makes_files_seeds_of_one_method(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.pth").write_bytes(b"weights")
    files = [str(tmp_path / f"{name}.pth") for name in ("a", "b")]
    found = steps(tmp_path, recipe=None, weights=files, tasks=["knn"], label="ours")
    assert {name: value(s, "--label") for name, s in found.items() if s.kind == "knn"} == {
        "knn/a": "ours", "knn/b": "ours",
    }  # fmt: skip
