"""Every command that writes, in every kind of output folder: its own, or refused with nothing touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main as pretrain
from pretrain.common.files import append_jsonl, write_json
from pretrain.common.locks import hold, process_start
from pretrain.common.output_folder import FORMAT, LOCK, MARKER
from slurm.__main__ import main as slurm
from transfer.__main__ import main as transfer

JUDGED = "--weights none.pth --dataset imagefolder --data-dir none"
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "pretrain": (pretrain, "--data-dir none"),
    "transfer knn": (transfer, f"knn {JUDGED} --protocol solo_knn@1"),
    "transfer linear": (transfer, f"linear {JUDGED} --protocol cached_linear@1"),
    "transfer semisup": (transfer, f"semisup {JUDGED} --protocol finetune@1 --label-percent 10"),
    "transfer export": (transfer, "export --weights none.pth --format timm"),
    "transfer report": (transfer, "report none"),
    "transfer scenes": (transfer, "scenes --data-dir none"),
    "transfer spectrum": (transfer, f"spectrum {JUDGED}"),
    "transfer spectrum-study": (transfer, "spectrum-study --data-dir none"),
    "transfer train-net": (transfer, "train-net --config-file scenes_R18_FPN --random-init --num-gpus 0"),
    "slurm suite": (slurm, "suite --weights none.pth --tasks knn --data-dir none --dataset imagefolder"),
    "slurm demo": (slurm, "demo --dataset cifar10 --data-dir none"),
}  # fmt: skip
"""Each with inputs that are not there: what passes the output folder ends at them."""
EARLIER = {
    "pretrain": {"data_dir": "d", "output": "o", "lr": 0.1, "epochs": 3},
    "transfer knn": {"weights": "w", "protocol": "p", "dataset": "d", "data_dir": "d", "output": "o"},
    "transfer linear": {"weights": "w", "protocol": "p", "dataset": "d", "data_dir": "d", "output": "o"},
    "transfer semisup": {
        "weights": "w", "protocol": "p", "dataset": "d", "data_dir": "d", "output": "o", "label_percent": 1
    },
    "transfer report": {"output": "o", "dirs": ["d"], "title": "t"},
    "transfer spectrum-study": {"data_dir": "d", "output": "o", "steps": 3},
    "transfer train-net": {"PROTOCOL": "coco_1x@1", "MODEL": {}, "SOLVER": {}},
}  # fmt: skip
"""What earlier versions, which left no marker, had in config.yaml."""
FILES = {"transfer export": "export.json", "transfer scenes": "scenes.json"}
"""Of the two that want their folder for themselves: what shows that it is."""
FOREIGN = {
    "config.yaml": "model: theirs\ntrainer: {epochs: 3}\n", "metrics.jsonl": '{"step": 1}\n',
    "backbone.safetensors": "theirs", "tables/main.csv": "theirs", ".notes.tmp": "theirs",
}  # fmt: skip


def call(command: str, output: Path | str, capfd: pytest.CaptureFixture) -> str:
    """The one line that a command that fails on its inputs or its output says."""
    main, words = COMMANDS[command]
    place = ["OUTPUT_DIR", str(output)] if command == "transfer train-net" else ["--output", str(output)]
    assert main([*words.split(), *place]) == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def missing(command: str) -> str:
    """The input that is not there."""
    return "scenes_train" if command == "transfer train-net" else "none"


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return request.param


def test_foreign_files_are_named_and_left_as_they_are(command: str, tmp_path: Path, capfd) -> None:
    output = tmp_path / "paper"
    for name, text in FOREIGN.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    said = call(command, output, capfd)
    assert "config.yaml" in said and said.endswith("; choose another folder"), said
    assert content(output) == FOREIGN


def test_impossible_places_are_told_in_one_line(command: str, tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    assert "is a file; a folder is wanted" in call(command, tmp_path / "file", capfd)
    places = [tmp_path / "file" / "below", tmp_path / ("x" * 300), tmp_path / "loop"]
    for place in places if command.startswith("slurm") else [*places, Path("/proc/none/out")]:
        said = call(command, place, capfd)
        assert "cannot be written to" in said or "a folder is wanted" in said, said
    assert (tmp_path / "file").read_text() == "mine"


def test_what_another_command_wrote_is_refused(command: str, tmp_path: Path, capfd) -> None:
    output = tmp_path / "out"
    write_json(output / MARKER, {"format": FORMAT, "commands": ["transfer other"]})
    (output / "config.yaml").write_text(FOREIGN["config.yaml"])
    said = call(command, output, capfd)
    assert "replace: config.yaml (it is that of an earlier `transfer other`)" in said
    assert sorted(os.listdir(output)) == [MARKER, "config.yaml"]


def test_files_that_it_would_not_replace_are_left_in_peace(command: str, tmp_path: Path, capfd) -> None:
    """Weights, and other commands' folders, beside what is to be written."""
    output = tmp_path / "out"
    write_json(output / "first" / "config.yaml", {"theirs": True})
    for name in ("model.pth.tar", "notes.txt", "r50.safetensors"):
        (output / name).write_text("theirs")
    before = content(output)
    said = call(command, output, capfd)
    assert ("first, model.pth.tar, notes.txt and 1 more" if command in FILES else missing(command)) in said
    left = {k: v for k, v in content(output).items() if k not in (MARKER, LOCK)}
    assert left == before


@pytest.mark.parametrize("second", ["transfer knn", "transfer linear", "transfer semisup"])
@pytest.mark.parametrize("first", ["transfer knn", "transfer linear", "transfer semisup", None])
def test_evaluators_share_a_folder(
    first: str | None, second: str, tmp_path: Path, capfd, monkeypatch
) -> None:
    """One after the other; also where only results are left there, and no settings."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    if first is not None:
        write_json(output / MARKER, {"format": FORMAT, "commands": [first]})
        (output / "config.yaml").write_text(yaml.safe_dump(EARLIER[first]))
    line = {"task": "knn", "dataset": "d", "split": "test", "n": 2, "metrics": {"top1": 50.0}, "protocol": {},
            "weights": {}}  # fmt: skip
    append_jsonl(output / "results.jsonl", line)
    assert "none.pth" in call(second, output, capfd)
    assert json.loads((output / MARKER).read_text())["commands"] == list(
        dict.fromkeys([*([first] if first else []), second])
    )
    assert json.loads((output / "results.jsonl").read_text()) == line


@pytest.mark.parametrize("marked", [True, False])
def test_what_passes_leaves_no_trace_where_nothing_was_written(
    command: str, marked: bool, tmp_path: Path, capfd
) -> None:
    """New, empty but for what is nobody's, its own by the marker, and its own of earlier versions."""
    assert (
        missing(command) in call(command, tmp_path / "new" / "out", capfd) and not (tmp_path / "new").exists()
    )
    output = tmp_path / "out"
    (output / "lost+found").mkdir(parents=True)
    (output / ".DS_Store").write_text("nobody's")
    assert missing(command) in call(command, output, capfd)
    if marked:
        write_json(output / MARKER, {"format": FORMAT, "commands": [command]})
    elif command in EARLIER:
        (output / "config.yaml").write_text(yaml.safe_dump(EARLIER[command]))
    elif command in FILES:
        (output / FILES[command]).write_text("{}")
    else:
        write_json(output / "jobs" / "knn" / "step.json", {})
    before = content(output)
    assert missing(command) in call(command, output, capfd)
    assert {k: v for k, v in content(output).items() if k not in (MARKER, LOCK)} == {
        k: v for k, v in before.items() if k != MARKER
    }


def test_a_folder_in_use_says_by_whom(command: str, tmp_path: Path, capfd) -> None:
    output = tmp_path / "out"
    if command.startswith("slurm"):
        pytest.skip("its inputs are checked before; tests/slurm/commands/test_status.py holds its lock")
    with hold(output / LOCK):
        said = call(command, output, capfd)
    assert f"is in use by process {os.getpid()} on {os.uname().nodename} (" in said, said
    assert os.listdir(output) == [LOCK]


def test_a_dead_holder_is_noticed(command: str, tmp_path: Path, capfd) -> None:
    """What a kill leaves: the lock's file and the note of who held it."""
    output = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with hold(output / LOCK):
            os._exit(0)
    os.waitpid(child, 0)
    left = json.loads((output / f"{LOCK}.by").read_text())
    assert left["pid"] == child and left["started"] != process_start(child)
    assert "in use" not in call(command, output, capfd)
