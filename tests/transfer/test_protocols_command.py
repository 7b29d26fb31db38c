"""`protocols show` and `check`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from transfer.__main__ import main
from transfer.evaluation.protocol import all_protocols, load_protocol
from transfer.protocols_command import VALUES, as_file, explained, values_of


@pytest.mark.parametrize("task", VALUES)
def test_every_value_of_a_protocol_is_explained(task: str) -> None:
    names = {f.name for f in dataclasses.fields(values_of(task))}
    docs = explained(values_of(task))
    assert names == docs.keys() and all(docs.values())


def test_what_is_shown_is_the_same_protocol(tmp_path: Path) -> None:
    for protocol in all_protocols():
        file = tmp_path / f"mine_{protocol}.yaml"
        file.write_text(as_file(protocol), encoding="utf-8")
        again = load_protocol(str(file))
        same = [(p.hash, p.title, p.source, p.differs) for p in (protocol, again)]
        assert same[0] == same[1], protocol


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["protocols", "show", "dino_knn@2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# dino_knn@2, hash ")
    assert (
        "  # Numbers of neighbours that vote, each with figures of its own.\n  ks: [10, 20, 100, 200]\n"
        in shown
    )
    unset = shown.partition("not in this file")[2]
    assert "  # Side of the images evaluated, px.\n  # crop: 224\n" in unset and "ks:" not in unset


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine@1.yaml"
    file.write_text(as_file(load_protocol("dino_knn@2")).replace("temperature: 0.07", "temperature: 0.1"))
    assert main(["protocols", "check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "mine@1: a protocol of task knn, hash " in shown
    assert "dino_knn@2, from which it differs in temperature: 0.1, there 0.07\n" in shown
    assert "its title and source are dino_knn@2's, and reports will print that" in shown
    with pytest.raises(UserError, match=r"named with its suffix: mine@1\.yaml"):
        load_protocol("mine@1")
    for old, new, said in (
        ("temperature: 0.1", "temperature: warm", "temperature: 'warm': wanted a number"),
        ("temperature: warm", "heat: 1", "unknown value 'heat'"),
        ("heat: 1", "ks: []", "ks: []: wanted at least one"),
    ):
        file.write_text(file.read_text().replace(old, new))
        assert main(["protocols", "check", str(file)]) == 2
        assert said in capsys.readouterr().err
    for words, said in (
        (["check", "dino_knn@2"], "wanted a YAML file"),
        (["check", str(tmp_path / "none@1.yaml")], "no such file"),
        (["tell", "dino_knn@2"], "wanted show NAME@VERSION or check FILE"),
    ):
        assert main(["protocols", *words]) == 2
        assert said in capsys.readouterr().err
