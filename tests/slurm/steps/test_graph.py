"""Order, keys, force and resources of the graph; what a command line turns into."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from pretrain.common.word_lists import spread
from slurm.execution.local import Machine
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import PROFILES, Resources, load_profile


def step(name: str, *argv: str, depends_on: tuple[str, ...] = (), **rest) -> Step:
    return Step(
        name=name,
        kind="knn",
        command="m",
        argv=argv,
        output=Path("/out") / name,
        depends_on=depends_on,
        **rest,
    )


def test_a_step_comes_after_what_it_waits_for() -> None:
    with pytest.raises(ValueError, match="b waits for c"):
        Graph([step("a"), step("b", depends_on=("c",)), step("c")])
    with pytest.raises(ValueError, match="two steps are named a"):
        Graph([step("a"), step("a")])


def test_the_key_covers_command_input_content_and_what_is_needed(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"one")

    def keys(*, option: str = "1", inputs: tuple[Path, ...] = (weights,)) -> dict[str, str]:
        return Graph([step("a", option, inputs=inputs), step("b", depends_on=("a",)), step("c")]).keys

    first = keys()
    assert keys() == first
    other = keys(option="2")
    assert other["a"] != first["a"] and other["b"] != first["b"] and other["c"] == first["c"]
    weights.write_bytes(b"two")
    assert keys()["a"] != first["a"]


def test_a_key_stays_the_same_when_code_moves() -> None:
    """An unfinished suite would be computed anew by another key; the command is the public one."""
    knn = Step(
        name="knn/intl", kind="knn", command="transfer knn", argv=("--weights", "w", "--seed", "0"),
        output=Path("/out/knn"),
    )  # fmt: skip
    report = Step(
        name="report", kind="report", command="transfer report", argv=(), output=Path("/out/report"),
        depends_on=("knn/intl",), after=("knn/intl",), makes=(Path("/out/report/index.html"),),
    )  # fmt: skip
    # sha256sum | cut -c-16 of {"argv": ["--weights", "w", "--seed", "0"], "command": "transfer knn", ...
    assert Graph([knn, report]).keys == {"knn/intl": "0a8700809f0138aa", "report": "f5ff46b93801642f"}
    moved = dataclasses.replace(knn, output=Path("/elsewhere"), makes=(Path("/x"),), kind="linear")
    assert moved.keyed({}) == knn.keyed({})


def test_force_takes_what_needs_it_along() -> None:
    graph = Graph(
        [step("a"), step("knn/x", depends_on=("a",)), step("knn/y"), step("z", depends_on=("knn/x",))]
    )
    assert graph.forced(["knn/x"]) == {"knn/x", "z"}
    assert graph.forced(["a"]) == {"a", "knn/x", "z"}
    assert Graph([step("lin/x"), step("lin/y")]).forced(["lin"]) == {"lin/x", "lin/y"}
    with pytest.raises(UserError, match="no such step; steps: a,"):
        graph.forced(["nope"])


def test_every_profile_loads_and_overrides_count() -> None:
    assert {"local", "slurm_gpu"} <= {p.stem for p in PROFILES.glob("*.yaml")}
    for path in PROFILES.glob("*.yaml"):
        assert load_profile(path.stem, [])["pretrain"].timeout_min > 0
    got = load_profile("slurm_gpu", ["pretrain.timeout_min=60", "all.account=vision", "knn.mem_gb=1.5"])
    assert got["pretrain"].timeout_min == 60 and got["linear"].timeout_min == 720
    assert {r.account for r in got.values()} == {"vision"} and got["knn"].mem_gb == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "defaults: {partion: gpu}",
            r"'partion' \(did you mean partition\?\); valid: account",
        ),
        ("tasks: {pretraining: {nodes: 1}}", "unknown kind of step 'pretraining'"),
        ("task: {}", "unknown section 'task'"),
        ("defaults: {nodes: two}", "nodes is 'two'; wanted int"),
        ("defaults: {timeout_min: 0}", "timeout_min is 0"),
        ("defaults: {cpus_per_task: some}", "cpus_per_task is 'some'"),
        ('defaults: {partition: "gpu\\nrm -rf x"}', r"partition is 'gpu\\nrm -rf x': control characters"),
        ('defaults: {constraint: "a\\x1b[2J"}', "constraint is .*control characters"),
        ("defaults: {account: a%j}", "account is 'a%j': SLURM replaces what follows a %"),
        ('defaults: {setup: ["date +%s", "a\\nb"]}', r"setup is 'a\\nb': control characters"),
        ('defaults: {sbatch: {reservation: "a\\nb"}}', r"sbatch is 'a\\nb': control characters"),
        ('defaults: {sbatch: {"a\\nb": true}}', r"sbatch is 'a\\nb': control characters"),
        ("defaults: {sbatch: {output: x.log}}", "sbatch: 'output' cannot be set"),
        ("defaults: {sbatch: {mail-type: [FAIL]}}", r"mail-type is \['FAIL'\]; wanted a text"),
        ("defaults: [1]", "wanted"),
        ("defaults: {", "is not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_with_what_is_valid(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_profile(str(path), [])


def test_a_wrong_override_is_refused() -> None:
    with pytest.raises(UserError, match=r"wanted KIND\.NAME=VALUE"):
        load_profile("local", ["timeout_min"])
    with pytest.raises(UserError, match="unknown kind of step 'nope'"):
        load_profile("local", ["nope.nodes=1"])
    with pytest.raises(UserError, match="no such file; known names: local"):
        load_profile("nowhere", [])


def test_requests_are_cut_to_the_machine() -> None:
    asked = Resources(nodes=2, gpus_per_node=8, cpus_per_task=10)
    fit = Machine(cpus=4, gpus=(0, 1)).fit(asked)
    assert (fit.nodes, fit.gpus_per_node, fit.tasks, fit.cpus_per_task) == (1, 2, 2, 2)
    fit = Machine(cpus=4).fit(Resources(cpus_per_task="all"))
    assert (fit.gpus_per_node, fit.tasks, fit.cpus_per_task) == (0, 1, 4)
    # eight GPUs asked for, none there: one task, not eight
    assert Machine(cpus=4).fit(Resources(gpus_per_node=8, cpus_per_task=2)).tasks == 1


def test_command_lines_as_people_write_them() -> None:
    words = ["--weights", "a.pth", "b.pth", "--tasks", "knn,linear", "--dry-run", "--seeds", "3"]
    assert spread(words, ["--weights", "--tasks"]) == [
        "--dry-run", "--seeds", "3", '--weights=["a.pth", "b.pth"]', '--tasks=["knn", "linear"]',
    ]  # fmt: skip
    assert spread(["--dry-run", "false"], ["--tasks"]) == ["--dry-run", "false"]


def test_commas_quotes_and_repetitions_in_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.pth", "c.pth", "[1].pth"):
        Path(name).touch()

    def weights(*words: str) -> list[str]:
        (told,) = spread([f"--weights={words[0]}", *words[1:]], ["--weights"])
        return json.loads(told.removeprefix("--weights="))

    assert weights("a,b.pth") == ["a,b.pth"] and weights("[1].pth") == ["[1].pth"]
    assert weights("a,b.pth,c.pth", "--weights", "x,y") == ["a,b.pth", "c.pth", "x", "y"]
    assert weights('["a,b.pth", "c.pth"]') == ["a,b.pth", "c.pth"] and weights("[x, y]") == ["x", "y"]
    words = [
        "--override",
        "all.partition=a,b,knn.nodes=1",
        "all.setup=[x, y]",
        "--detection-data",
        "a=1:2,b=3:4",
    ]
    assert spread(words, ["--override", "--detection-data"]) == [
        '--override=["all.partition=a,b", "knn.nodes=1", "all.setup=[x, y]"]',
        '--detection-data=["a=1:2", "b=3:4"]',
    ]
    words = ["--more", "--ema", "--seeds", "3", "--more=--label 'x y'"]
    assert spread(words, [], ["--more"]) == ["--seeds", "3", "--more=--ema --label 'x y'"]
    assert spread(["--more"], [], ["--more"]) == ["--more"]
