"""The zoo: what its manifest says, and files fetched once, checked, resumed, or put by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import yaml

import transfer.zoo.download
from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from slurm.steps import checks
from slurm.steps.resources import load_profile
from slurm.steps.suite import Suite, suite_graph
from tests.helpers.checkpoint_zoo import ZOO as written
from tests.helpers.checkpoint_zoo import backbone
from transfer.__main__ import main
from transfer.checkpoints.backbone import load_backbone
from transfer.checkpoints.formats import FORMATS
from transfer.evaluation import results
from transfer.zoo.download import fetch, place_of
from transfer.zoo.figures import load_published
from transfer.zoo.manifest import find_entry, load_zoo

SOURCE = "https://example.org/paper"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTL_BENCH_DATA", str(tmp_path / "cache"))


def manifest(folder: Path, name: str = "tiny", **entry: object) -> str:
    file = folder / "my_zoo.yaml"
    entry = {"source": SOURCE, **entry}
    file.write_text(yaml.safe_dump({"checkpoints": {name: entry}}), encoding="utf-8")
    return str(file)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A few bytes in the place of a published file."""
    file = tmp_path / "published.pth"
    file.write_bytes(bytes(range(256)) * 12_000)
    return file


# ------------------------------------------------------------------ what the manifest says


def test_the_shipped_manifest_and_the_figures_fit() -> None:
    zoo = load_zoo()
    named = {p.checkpoint for p in load_published()} - {""}
    assert named <= zoo.keys() and len(named) > 60
    formats = {f.name for f in FORMATS}
    for entry in zoo.values():
        assert entry.url.startswith("https://") and entry.source.startswith("https://"), entry.name
        assert entry.format in ("", *formats), entry.name
        assert {p.arch for p in entry.figures} <= {entry.arch}, entry.name
        if entry.arch:
            assert timm.is_model(entry.arch), entry.name
    assert len({e.url for e in zoo.values()}) == len(zoo)
    for method, count in {
        "intl": 5, "resa": 5, "swav": 7, "deepclusterv2": 3, "dino": 1, "mocov1": 1, "mocov2": 2, "mocov3": 3,
        "simsiam": 2, "barlowtwins": 1, "vicreg": 1, "lightly": 10, "torchvision": 2,
    }.items():  # fmt: skip
        found = [e for e in zoo.values() if e.name.startswith(f"{method}_") and e.arch == "resnet50"]
        assert len(found) == count, method
    # the file itself, not the mean of five trainings that the same page has
    assert [dict(p.metrics) for p in zoo["mocov2_resnet50_ep200"].figures] == [{"top1": 67.7}]
    assert (zoo["lightly_dino_resnet50"].branch, zoo["dino_resnet50"].branch) == ("ema", "online")


def test_the_list_and_one_entry(tmp_path: Path, published: Path, capsys: pytest.CaptureFixture) -> None:
    mine = manifest(tmp_path, url=published.as_uri(), sha256="0" * 64)
    assert main(["zoo", "--zoo", mine]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "tiny online" in shown and "dino_resnet50 resnet50 online linear 75.3 (dino_rn50_linear@1)" in shown
    )
    assert main(["zoo", "zoo:dino_resnet50"]) == 0
    shown = capsys.readouterr().out
    assert "dino_resnet50_pretrain.pth\n" in shown and "(not fetched yet)" in shown and "75.3" in shown
    assert main(["zoo", "tiny", "--zoo", mine, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["name"], one["url"], one["source"]) == ("tiny", published.as_uri(), SOURCE)
    assert main(["zoo", "dino_resnet5"]) == 2
    assert "did you mean dino_resnet50" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "tiny: wanted url"),
        ({"url": "ftp://x/y"}, "wanted https://, http://, file:///"),
        *(
            ({"url": url}, said)
            for url, said in (
                ("http://[bad", "no URL"), ("https://x:y/z", "no URL"), ("https://x:99999/z", "no URL"),
                ("https:///z", "names no host"), ("https://münchen.example/z", "printable ASCII"),
                ("https://x/\u00b2", "printable ASCII"), ("https://x/a b", "printable ASCII"),
                ("https://x/a\r\nHost: y", "printable ASCII"), ("https://x/" + "a" * 2000, "at most 2000"),
            )
        ),
        ({"url": "https://x/y", "epochs": True}, "epochs True: wanted a whole number"),
        ({"url": "https://x/y", "epochs": 10**30}, "epochs .*: wanted a whole number"),
        ({"url": "https://x/y", "size": 3}, "unknown size; there are url,"),
        ({"url": "https://x/y", "branch": "teacher"}, "branch 'teacher': wanted online or ema"),
        ({"url": "https://x/y", "sha256": 12345678}, "sha256: 12345678: wanted text"),
        ({"url": "https://x/y", "sha256": "xyz"}, "sha256: wanted 6 to 64 hexadecimal digits"),
        ({"url": "https://x/y", "epochs": "ten"}, "epochs 'ten': wanted a whole number"),
        ({"url": "https://x/y", "figures": [{"task": "knn", "dataset": "d", "n": 3}]}, "metrics"),
        ({"url": "https://x/y", "figures": [{"task": "knn", "dataset": "d", "metrics": {"a": 5}}]}, " n,"),
        ({"url": "https://x/y", "figures": ["knn 75"]}, "figures: wanted a list of rows"),
        *(
            ({"url": "https://x/y", "figures": [{"task": "knn", "dataset": "d", "n": 3, **wrong}]}, said)
            for wrong, said in (
                ({"metrics": {"a": 1}, "dataset": [1]}, r"dataset: \[1\]: wanted text"),
                ({"metrics": {"a": 1}, "task": {"a": 1}}, "task: {'a': 1}: wanted text"),
                ({"metrics": {"a": 1}, "split": 3}, "split: 3: wanted text"),
                ({"metrics": {"a": 1}, "trials": "x"}, "trials: 'x': wanted a whole number"),
                ({"metrics": {"a": 1}, "n": True}, "wanted n, the number of images"),
                ({"metrics": {"a": 1}, "n": 10**30}, "wanted n, the number of images"),
                ({"metrics": {"a": math.nan}}, "metrics: .*wanted entries NAME: NUMBER"),
                ({"metrics": {1: 70.0}}, "metrics: .*wanted entries NAME: NUMBER"),
                ({"metrics": {"a": 70.0}, "tolerance": {"a": math.inf}}, "tolerance: .*NAME: NUMBER"),
                ({"metrics": {"a": 70.0}, "tolerance": {"a": -1}}, "tolerance: .*at least 0"),
            )
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path: Path, entry: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_zoo(manifest(tmp_path, **entry))


def test_names_of_a_manifest(tmp_path: Path) -> None:
    for name, said in (
        ("dino_resnet50", "a name of the project's own"),
        ("../up", "wanted a name of letters"),
    ):
        with pytest.raises(UserError, match=said):
            load_zoo(manifest(tmp_path, name, url="https://x/y"))
    with pytest.raises(UserError, match="No such file"):
        load_zoo(tmp_path / "none.yaml")


# ------------------------------------------------------------------ fetching


def entry_of(folder: Path, **said: object):
    return find_entry("tiny", manifest(folder, **said))


def test_fetched_once_and_kept(tmp_path: Path, published: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    caplog.set_level("INFO")
    path = fetch(entry_of(tmp_path, url=published.as_uri()))
    assert path.read_bytes() == published.read_bytes() and path.is_relative_to(tmp_path / "cache")
    assert f"sha256 {digest}; its manifest has none" in caplog.text
    published.unlink()  # there is no network any more
    for known in (
        {"sha256": digest[:8]},
        {"sha256": digest},
        {"md5": hashlib.md5(path.read_bytes()).hexdigest()},
    ):
        assert fetch(entry_of(tmp_path, url=published.as_uri(), **known)) == path
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == [path.name]
    other = entry_of(tmp_path, url=published.with_name("other.pth").as_uri())
    assert place_of(other) != path  # two manifests may name two files alike


def test_a_download_that_was_cut_goes_on(tmp_path: Path, published: Path) -> None:
    whole, half = published.read_bytes(), 1_500_000
    entry = entry_of(tmp_path, url=published.as_uri(), sha256=hashlib.sha256(whole).hexdigest())
    part = place_of(entry).with_name(f"{place_of(entry).name}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:half])
    # the first half is no longer there to be read: only what was fetched before can give it
    published.write_bytes(bytes(half) + whole[half:])
    stat = published.stat()
    note = {"url": published.as_uri(), "version": f"{stat.st_size} {stat.st_mtime_ns}"}
    part.with_name(f"{part.name}.json").write_text(json.dumps(note))
    assert fetch(entry).read_bytes() == whole
    assert not part.exists()


def test_a_part_of_another_version_is_not_gone_on_with(tmp_path: Path, published: Path) -> None:
    entry = entry_of(tmp_path, url=published.as_uri())
    part = place_of(entry).with_name(f"{place_of(entry).name}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"an older version")
    part.with_name(f"{part.name}.json").write_text(json.dumps({"url": published.as_uri(), "version": "9 9"}))
    assert fetch(entry).read_bytes() == published.read_bytes()


def test_another_file_than_the_manifests_is_not_kept(tmp_path: Path, published: Path) -> None:
    for known in ({"sha256": "0" * 64}, {"md5": "0" * 8}):
        entry = entry_of(tmp_path, url=published.as_uri(), **known)
        with pytest.raises(UserError, match=r"and the manifest says 0+; fetch .* and put it at /"):
            fetch(entry)
        assert [p.name for p in place_of(entry).parent.iterdir() if p.suffix in (".pth", ".part")] == []


def test_a_web_page_is_no_checkpoint(tmp_path: Path, published: Path) -> None:
    published.write_text("\n<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    with pytest.raises(UserError, match="is a web page; fetch"):
        fetch(entry_of(tmp_path, url=published.as_uri()))


@pytest.mark.parametrize(
    "text", ["!!bool foo", "!!timestamp foo", '!!int ""', "[" * 3000, "#" * (1 << 20) + "x"], ids=range(5)
)
def test_no_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(f"checkpoints: {text}\n")
    with pytest.raises(UserError, match=r"--zoo .*(not YAML|larger than 1,048,576 bytes)"):
        load_zoo(tmp_path / "zoo.yaml")


def test_a_device_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero is no file"):
        fetch(entry_of(tmp_path, url="file:///dev/zero"))


def test_a_file_without_end_is_not_fetched(tmp_path: Path, published: Path, monkeypatch) -> None:
    monkeypatch.setattr(transfer.zoo.download, "LARGEST", 1_000_000)
    with pytest.raises(UserError, match="3,072,000 bytes; 1,000,000 are the most"):
        fetch(entry_of(tmp_path, url=published.as_uri()))


def test_without_a_network_it_says_where_to_put_the_file(tmp_path: Path, published: Path) -> None:
    whole = published.read_bytes()
    published.unlink()
    entry = entry_of(tmp_path, url=published.as_uri(), sha256=hashlib.sha256(whole).hexdigest())
    with pytest.raises(UserError) as told:
        fetch(entry)
    assert entry.url in str(told.value) and f"put it at {place_of(entry)}" in str(told.value)
    place_of(entry).write_bytes(whole[:-1])
    with pytest.raises(UserError, match="delete it, and it is fetched anew"):
        fetch(entry)
    assert place_of(entry).read_bytes() == whole[:-1]  # what a user put there is the user's
    place_of(entry).write_bytes(whole)
    assert fetch(entry) == place_of(entry)


# ------------------------------------------------------------------ as --weights


@pytest.fixture(scope="module")
def moco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two networks, as MoCo writes them."""
    path = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    torch.save(written["MoCo v1, v2; PCL"][0](backbone(0), backbone(1)), path)
    return path


def test_zoo_names_are_weights(moco: Path, cifar_folder: Path, tmp_path: Path, capsys) -> None:
    mine = manifest(tmp_path, url=moco.as_uri(), branch="ema", arch="resnet50", format="MoCo v1, v2; PCL")
    loaded = load_backbone("zoo:tiny", zoo=mine)
    online = load_backbone("zoo:tiny", zoo=mine, branch="online")
    # the published branch, unless another is asked for
    for found, name, seed in ((loaded, "ema", 1), (online, "online", 0)):
        assert (found.branch, found.path, found.sha256) == (name, "zoo:tiny", sha256_of(moco))
        assert torch.equal(found.network().conv1.weight, backbone(seed)["conv1.weight"])
    assert loaded.notes[-1] == "zoo:tiny should have the architecture resnet50, and was read as resnet18"
    assert main(["inspect", "zoo:tiny", "--zoo", mine]) == 0
    assert "tensors of the ema branch" in " ".join(capsys.readouterr().out.split())
    words = ["--dataset", "imagefolder", "--data-dir", str(cifar_folder), "--output", str(tmp_path / "o")]
    words += ["--weights", "zoo:tiny", "--protocol", "dino_knn@2", "--image-size", "32", "--workers", "0"]
    assert main(["knn", *words, "--zoo", mine]) == 0
    (line,) = results.read(tmp_path / "o")
    assert (line.weights["path"], line.weights["branch"]) == ("zoo:tiny", "ema")
    assert "read_with" not in line.weights
    with pytest.raises(UserError, match="goes with --weights zoo:NAME"):
        load_backbone(moco, zoo=mine)


def test_a_suite_fetches_what_its_jobs_read(moco: Path, tmp_path: Path) -> None:
    mine = manifest(tmp_path, url=moco.as_uri(), branch="ema")
    asked = Suite(
        output=str(tmp_path / "suite"), weights=["zoo:tiny", str(moco)], zoo=mine, tasks=["knn"], data_dir="."
    )
    graph = suite_graph(tmp_path / "suite", asked, load_profile("local", []))
    steps = {s.name: s.argv for s in graph}
    kept = str(place_of(find_entry("tiny", mine)))
    assert steps["knn/tiny"][1] == kept and "--zoo" not in steps["knn/tiny"]
    assert [argv[argv.index("--branch") + 1] for argv in (steps["knn/tiny"], steps["knn/moco.pth"])] == [
        "ema", "online",
    ]  # fmt: skip
    assert Path(kept).read_bytes() == moco.read_bytes()


def test_a_suite_reproduces_published_figures(moco: Path, tmp_path: Path) -> None:
    row = {
        "task": "knn",
        "dataset": "imagefolder",
        "n": 40,
        "protocol": "dino_knn@2",
        "metrics": {"top1_k20": 9},
    }
    mine = manifest(tmp_path, url=moco.as_uri(), figures=[row])
    given = {"zoo": mine, "tasks": ["reproduce"], "data_dir": ".", "output": str(tmp_path / "suite")}
    asked = Suite(weights=["zoo:tiny"], dataset="imagefolder", **given)
    graph = suite_graph(tmp_path / "suite", asked, load_profile("local", []))
    step = graph.steps["reproduce/tiny"]
    assert step.shell.startswith(f"python -m transfer reproduce tiny --zoo {mine} --dataset imagefolder ")
    assert step.module == "transfer.reproduce" and step.makes[0].name == "reproduction.json"
    assert checks._reproductions(asked) == []
    (problem,) = checks._reproductions(dataclasses.replace(asked, dataset="imagenet"))
    assert "it is of imagefolder" in problem
    for weights in ({"weights": [str(moco)]}, {"recipe": "cifar10_two_cores"}):
        with pytest.raises(UserError, match="--tasks reproduce: wanted --weights zoo:NAME"):
            Suite(**given | {"zoo": None}, **weights)


# ------------------------------------------------------------------ a real server


class Server(http.server.BaseHTTPRequestHandler):
    """One file; cuts the first `cuts` answers short, and goes on where it is asked to."""

    content, tag, cuts, ranges = b"", '"1"', 0, True
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        kind = type(self)
        span = self.headers.get("Range", "")
        kind.asked.append(span)
        start = int(span[6:-1]) if span and kind.ranges and self.headers.get("If-Range") == kind.tag else 0
        body = kind.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(kind.content) - 1}/{len(kind.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", kind.tag)
        self.end_headers()
        if kind.cuts > 0:
            kind.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked, Server.cuts, Server.ranges, Server.tag = [], 0, True, '"1"'
    Server.content = bytes(range(256)) * 12_000
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/a/file.pth.tar"
        serving.shutdown()
        thread.join()


@pytest.mark.faults
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_cuts_off(server: str, ranges: bool, tmp_path: Path) -> None:
    Server.cuts, Server.ranges = (2, True) if ranges else (1, False)
    entry = entry_of(tmp_path, url=server)
    assert fetch(entry).read_bytes() == Server.content
    size = len(Server.content)
    wanted = (
        ["", f"bytes={size // 2}-", f"bytes={size // 2 + size // 4}-"]
        if ranges
        else ["", f"bytes={size // 2}-"]
    )
    assert Server.asked == wanted
    assert place_of(entry).name.endswith(".pth.tar")


@pytest.mark.faults
def test_a_file_that_changed_on_the_server(server: str, tmp_path: Path) -> None:
    Server.cuts = 99
    entry = entry_of(tmp_path, url=server)
    part = place_of(entry).with_name(f"{place_of(entry).name}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    part.with_name(f"{part.name}.json").write_text(json.dumps({"url": server, "version": '"0"'}))
    Server.cuts = 0
    assert fetch(entry).read_bytes() == Server.content
    assert Server.asked == ["bytes=1000-"]  # asked to go on, and sent all of the new one


class OddServer(http.server.BaseHTTPRequestHandler):
    """Answers with the status, headers and body of the path in `answers`."""

    answers: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]] = {
        "/square": (200, {"Content-Length": "\u00b2"}, b"12"),
        "/long": (200, {"Content-Length": "9" * 5000}, b"12"),
        "/empty": (200, {"Content-Length": "0"}, b""),
        "/nothing": (200, {}, b""),
        "/moved": (302, {"Location": "http://[bad"}, b""),
        "/device": (302, {"Location": "file:///dev/zero"}, b""),
        "/part": (206, {"Content-Range": "bytes 0-" + "9" * 5000 + "/\u00b2"}, b"12"),
        "/lie": (200, {"Content-Length": "3"}, b"12"),
    }

    def do_GET(self) -> None:
        status, headers, body = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_odd_answers_of_a_server(tmp_path: Path) -> None:
    """Each is kept where it is whole, or refused in one line that says where to put the file by hand."""
    with http.server.HTTPServer(("127.0.0.1", 0), OddServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path, said in (
            ("/square", None), ("/long", None), ("/empty", "an empty answer"),
            ("/nothing", "an empty answer"),
            ("/moved", "could not be fetched"), ("/device", "could not be fetched"),
            ("/part", "asked for bytes from 0"), ("/lie", "could not be fetched"),
        ):  # fmt: skip
            entry = entry_of(tmp_path, url=f"http://127.0.0.1:{server.server_port}{path}")
            if said is None:
                assert fetch(entry).read_bytes() == b"12"
                continue
            with pytest.raises(UserError, match=f"{said}.*put it at {place_of(entry)}"):
                fetch(entry)
            assert not place_of(entry).exists()
        server.shutdown()
