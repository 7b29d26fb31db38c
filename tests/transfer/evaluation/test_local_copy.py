"""Staging: a whole, checked copy on the node's disk, made once however many processes ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from pretrain.data.datasets import open_dataset
from transfer.evaluation import local_copy
from transfer.evaluation.local_copy import DONE, listing, stage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "pictures"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(5):
                (folder / split / name / f"{i}.jpg").write_bytes(f"{split} {name} {i}".encode() * (i + 1))
    return folder


def _inodes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_ino for name in listing(folder).files}


def test_the_copy_is_the_source_byte_for_byte_with_its_times(source: Path, tmp_path: Path) -> None:
    copy = stage(source, tmp_path / "local")
    assert copy.parent == tmp_path / "local"
    assert listing(copy) == listing(source)
    assert len(listing(copy).files) == 20
    for name in listing(source).files:
        assert (copy / name).read_bytes() == (source / name).read_bytes()


def test_a_second_call_copies_nothing(source: Path, tmp_path: Path) -> None:
    first = stage(source, tmp_path / "local")
    before = _inodes(first)
    assert stage(source, tmp_path / "local") == first
    assert _inodes(first) == before


@pytest.mark.parametrize(
    "change", ["gone", "shorter", "other bytes", "new in source", "more in copy", "newer in source"]
)
def test_only_what_differs_is_copied_again(source: Path, tmp_path: Path, change: str) -> None:
    copy = stage(source, tmp_path / "local")
    before = _inodes(copy)
    name = "train/cat/3.jpg"
    if change == "gone":
        (copy / name).unlink()
    elif change == "shorter":
        (copy / name).write_bytes(b"x")
    elif change == "other bytes":  # of the same size and time, as a failing disk or a crash leaves them
        stat = (copy / name).stat()
        (copy / name).write_bytes(bytes(stat.st_size))
        os.utime(copy / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "new in source":
        name = "train/cat/new.jpg"
        (source / name).write_bytes(b"new")
    elif change == "more in copy":
        (copy / "train/cat/stray.jpg").write_bytes(b"stray")
    else:
        (source / name).write_bytes((source / name).read_bytes()[::-1])
        os.utime(source / name, ns=(1, 1))
    assert stage(source, tmp_path / "local") == copy
    assert listing(copy) == listing(source)
    assert (copy / name).read_bytes() == (source / name).read_bytes()
    after = _inodes(copy)
    assert {n for n in after if after[n] != before.get(n)} <= {name}


def test_a_copy_cut_off_is_not_taken_for_whole_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def dies(origin: Path, target: Path, name: str) -> int:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(name)
        return copy_file(origin, target, name)

    copy_file = local_copy._copy_file
    monkeypatch.setattr(local_copy, "_copy_file", dies)
    monkeypatch.setattr(local_copy, "THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        stage(source, tmp_path / "local")
    (target,) = (tmp_path / "local").iterdir()
    assert not (target / DONE).exists()
    before = _inodes(target)
    assert len(before) == 7
    monkeypatch.setattr(local_copy, "_copy_file", copy_file)
    assert stage(source, tmp_path / "local") == target
    assert listing(target) == listing(source)
    assert {n: _inodes(target)[n] for n in before} == before  # these were not copied twice


def test_processes_of_a_node_make_one_copy(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom transfer.evaluation import local_copy\n"
        "real = local_copy._copy_file\n"
        "def noted(source, target, name):\n"
        "    open(sys.argv[3], 'a').write(name + chr(10))\n    return real(source, target, name)\n"
        "local_copy._copy_file = noted\nprint(local_copy.stage(sys.argv[1], sys.argv[2]))\n"
    )
    log = tmp_path / "copied"
    words = [sys.executable, "-c", code, str(source), str(tmp_path / "local"), str(log)]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {p.communicate()[0].strip() for p in started}
    assert [p.returncode for p in started] == [0, 0, 0]
    assert len(paths) == 1
    assert sorted(log.read_text().split()) == sorted(listing(source).files)


def test_ranks_of_one_run_trust_the_first_ones_comparison(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "12345"}.items():
        monkeypatch.setenv(name, value)
    copy = stage(source, tmp_path / "local")
    with monkeypatch.context() as patch:
        patch.setattr(local_copy, "listing", lambda folder, **_: pytest.fail("compared again"))
        assert stage(source, tmp_path / "local") == copy
    monkeypatch.setenv("MASTER_PORT", "12346")  # another run compares anew
    (copy / "train/cat/1.jpg").unlink()
    stage(source, tmp_path / "local")
    assert (copy / "train/cat/1.jpg").exists()


def test_a_staged_data_set_keeps_its_fingerprint(cifar_folder: Path, tmp_path: Path) -> None:
    copy = stage(cifar_folder, tmp_path / "local")
    for split in ("train", "test"):
        original, staged = (open_dataset("cifar10", folder, split) for folder in (cifar_folder, copy))
        assert staged.root != original.root
        assert staged.fingerprint == original.fingerprint


def test_two_data_sets_of_one_name_do_not_meet(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(source / "val", other)
    assert stage(source, tmp_path / "local") != stage(other, tmp_path / "local")


def test_wrong_bytes_on_the_way_are_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(range(10**6))
    monkeypatch.setattr(local_copy, "crc32", lambda block, start: next(sums))
    with pytest.raises(local_copy.RunFailed, match="other bytes"):
        stage(source, tmp_path / "local")
    assert not list((tmp_path / "local").rglob("*.jpg"))


def test_a_link_in_the_way_is_not_followed(source: Path, tmp_path: Path) -> None:
    copy = stage(source, tmp_path / "local")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (copy / local_copy.LOCK).unlink()
    (copy / local_copy.LOCK).symlink_to(victim)
    with pytest.raises(UserError, match="symbolic links"):
        stage(source, tmp_path / "local")
    assert victim.read_text() == "precious"


def test_a_folder_that_others_may_have_filled_is_refused(source: Path, tmp_path: Path) -> None:
    copy = stage(source, tmp_path / "local")
    assert copy.stat().st_mode & 0o777 == 0o700
    copy.chmod(0o777)
    with pytest.raises(UserError, match=r"can be changed by others \(other users may write in it"):
        stage(source, tmp_path / "local")
    shutil.rmtree(copy)
    (tmp_path / "elsewhere").mkdir()
    copy.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can be changed by others"):
        stage(source, tmp_path / "local")
    copy.unlink()
    copy.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(copy, 12345, 12345)
        with pytest.raises(UserError, match="another user's"):
            stage(source, tmp_path / "local")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_bad_input_is_said_before_anything_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no such folder"):
        stage(tmp_path / "nothing", tmp_path / "local")
    with pytest.raises(UserError, match="inside the data set"):
        stage(source, source / "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        stage(tmp_path / "empty", tmp_path / "local")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        stage(source, tmp_path / "file" / "local")
    (source / "train/cat/9.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="a broken link"):
        stage(source, tmp_path / "local")
    (source / "train/cat/9.jpg").unlink()
    (source / "train/cat/up").symlink_to(source / "train")
    with pytest.raises(UserError, match="a link back to a folder above"):
        stage(source, tmp_path / "local")
    (source / "train/cat/up").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="GB to copy"):
        stage(source, tmp_path / "local")
