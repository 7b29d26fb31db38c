"""Nothing in a stranger's file runs, nothing that lies allocates, and honest files are read."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import random
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pretrain.common.errors import UserError
from tests.helpers.damage import spoilt
from transfer.__main__ import main
from transfer.checkpoints.safe_load import Placeholder, load_file

STATE = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.tensor([1, 2, 3])}
CONTAINERS = ["zip", "legacy"]


def write(value: Any, path: Path, container: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=container == "zip")
    return path


def with_pickle(payload: bytes, path: Path, container: str) -> Path:
    """A file as torch.save packs it, but with `payload` as its pickle."""
    if container == "zip":
        write(STATE, path, "zip")
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in records.items():
                archive.writestr(name, payload if name.endswith("/data.pkl") else data)
    else:
        front = [
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        ]
        head = b"".join(pickle.dumps(part, protocol=2) for part in front)
        path.write_bytes(head + payload + pickle.dumps([], protocol=2))
    return path


# ------------------------------------------------------------------ honest files


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"args": argparse.Namespace(lr=0.1, arch="resnet50")}, {"argparse.Namespace"}),
        ({"cfg": OmegaConf.create({"a": [1, {"b": 2}]})}, {"omegaconf.dictconfig.DictConfig"}),
    ],
    ids=["namespace", "omegaconf"],
)
def test_honest_files_that_weights_only_refuses(container: str, extra: dict, names: set[str], tmp_path: Path):
    path = write({"state_dict": STATE, "nested": [extra, (extra,)], **extra}, tmp_path / "m.pth", container)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = load_file(path)
    assert found.container == container and names <= set(found.placeholders)
    assert all(torch.equal(found.value["state_dict"][k], v) for k, v in STATE.items())
    assert all(isinstance(found.value[k], Placeholder) for k in extra)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("protocol", [2, 5])
def test_numpy_numbers_and_arrays_are_read_as_numbers_and_tensors(
    container: str, protocol: int, tmp_path: Path
):
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "big": np.arange(3, dtype=">f8"),
        "unsigned": np.array([1, 65535], np.uint16),
        "flags": np.array([True, False]),
        "empty": np.empty((0, 4), np.float32),
        "scalar": np.array(2.5),
    }
    value = {
        "best": np.float64(71.3),
        "step": np.int64(3),
        "ok": np.bool_(True),
        **arrays,
        "in": [(arrays["c"],)],
    }
    torch.save(
        value, tmp_path / "m.pth", pickle_protocol=protocol,
        _use_new_zipfile_serialization=container == "zip",
    )  # fmt: skip
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    for path in (tmp_path / "m.pth", tmp_path / "m.pkl"):
        found = load_file(path).value
        assert (found["best"], found["step"], found["ok"]) == (71.3, 3, True)
        for name, array in arrays.items():
            assert found[name].shape == array.shape, name
            assert found[name].tolist() == array.tolist(), name
        assert torch.equal(found["in"][0][0], found["c"])
    names = {"classes": np.array(["cat", "dog"], dtype=object), "texts": np.array(["a", "bc"])}
    found = load_file(write(names, tmp_path / "m.pth", container))
    assert found.placeholders == ("numpy.ndarray",)
    assert all(isinstance(v, Placeholder) for v in found.value.values())


def test_an_array_cannot_choose_its_type_or_size(tmp_path: Path):
    """A dtype of objects would make pointers of the file's bytes; a size beyond them reads other memory."""
    plain = pickle.dumps({"a": np.arange(4, dtype=np.int64)}, protocol=2)
    assert plain.count(b"i8") == 1
    (tmp_path / "o.pkl").write_bytes(plain.replace(b"i8", b"O8"))
    assert isinstance(load_file(tmp_path / "o.pkl").value["a"], Placeholder)
    shape = b"K\x04\x85"
    assert plain.count(shape) == 1
    (tmp_path / "l.pkl").write_bytes(plain.replace(shape, b"K\x40\x85"))
    with pytest.raises(UserError, match=r"an array of size \(64,\) in 32 bytes"):
        load_file(tmp_path / "l.pkl")


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_expanded_tensor_is_honest(container: str, tmp_path: Path):
    path = write({"w": torch.tensor([3.0]).expand(64)}, tmp_path / "m.pth", container)
    assert load_file(path).value["w"].tolist() == [3.0] * 64


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_kind_of_tensor_arrives(container: str, tmp_path: Path):
    base = torch.arange(24.0).view(4, 6)
    tied = torch.arange(5)
    value = OrderedDict(
        half=torch.rand(3).half(),
        bf16=torch.rand(3).bfloat16(),
        double=torch.rand(2).double(),
        byte=torch.tensor([1, 2], dtype=torch.uint8),
        flag=torch.tensor([True, False]),
        scalar=torch.tensor(7),
        empty=torch.empty(0, 3),
        window=base[1:3, 2:5],
        turned=base.t(),
        last=torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.rand(2)),
        one=tied,
        two=tied[2:],
        complex=torch.rand(2, dtype=torch.complex64),
    )
    found = load_file(write(value, tmp_path / "m.pth", container))
    assert not found.placeholders
    for key, tensor in value.items():
        assert found.value[key].dtype == tensor.dtype
        assert torch.equal(found.value[key], tensor), key
    assert found.value["one"].untyped_storage().data_ptr() == found.value["two"].untyped_storage().data_ptr()


def test_safetensors_with_metadata(tmp_path: Path):
    save_file(STATE, tmp_path / "m.safetensors", {"arch": "resnet18"})
    found = load_file(tmp_path / "m.safetensors")
    assert found.metadata == {"arch": "resnet18"} and torch.equal(found.value["bias"], STATE["bias"])


# ------------------------------------------------------------------ hostile files

EVIL = "evil_module_of_the_test"


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that create `marker` when anything of them is imported or called."""
    touch = f"touch {marker}".encode()
    word = b"X" + struct.pack("<I", len(touch)) + touch
    code = f"open({str(marker)!r}, 'w')".encode()
    run = b"X" + struct.pack("<I", len(code)) + code
    inner = b"\x80\x02cos\nsystem\n" + word + b"\x85R."
    system = b"cos\nsystem\n"

    def short(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode()

    return {
        "reduce": b"\x80\x02" + system + word + b"\x85R.",
        "reduce with eval": b"\x80\x02cbuiltins\neval\n" + run + b"\x85R.",
        "in a state dict": b"\x80\x02}X\x01\x00\x00\x00a" + system + word + b"\x85Rs.",
        "as a key": b"\x80\x02}" + system + word + b"\x85RK\x01s.",
        "in Namespace's state": b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00a"
        + system + word + b"\x85Rsb.",
        "stack_global": b"\x80\x04" + short("os") + short("system") + b"\x93" + word + b"\x85R.",
        "inst": b"(" + word + b"ios\nsystem\n.",
        "obj": b"(" + system + word + b"o.",
        "newobj": b"\x80\x02c" + EVIL.encode() + b"\nActs\n)\x81.",
        "newobj_ex": b"\x80\x04c" + EVIL.encode() + b"\nActs\n)}\x92.",
        "build through __setstate__": b"\x80\x02c" + EVIL.encode() + b"\nActs\n)\x81}b.",
        "build with attributes": b"\x80\x02c" + EVIL.encode() + b"\nholder\nN}X\x06\x00\x00\x00"
        b"actionK\x01s\x86b.",
        "only an import": b"\x80\x02c" + EVIL.encode() + b"\nholder\n.",
        "a pickle in a pickle": b"\x80\x02c_pickle\nloads\nc_codecs\nencode\nX"
        + struct.pack("<I", len(inner.decode("latin1").encode())) + inner.decode("latin1").encode()
        + b"X\x06\x00\x00\x00latin1\x86R\x85R.",
        "getattr of a module": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"
        b"X\x06\x00\x00\x00system\x86R" + word + b"\x85R.",
        "through torch's own rebuild": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + system
        + b"ctorch\nTensor\n" + word + b"\x85}tR.",
        "append to an object": b"\x80\x02c" + EVIL.encode() + b"\nActs\n)\x81K\x01a.",
        "items of an object": b"\x80\x02c" + EVIL.encode() + b"\nActs\n)\x81K\x01K\x02s.",
    }  # fmt: skip


ATTACKS = sorted(attacks(Path("x")))


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable module that leaves the marker when it is imported or its class is used."""
    marker = tmp_path / "ran"
    (tmp_path / f"{EVIL}.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Acts:\n    pass\nholder = Acts()\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield marker
    sys.modules.pop(EVIL, None)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_runs(name: str, evil_module: Path, tmp_path: Path):
    marker = evil_module
    payload = attacks(marker)[name]
    files = [with_pickle(payload, tmp_path / f"{c}.pth", c) for c in CONTAINERS]
    (tmp_path / "plain.pkl").write_bytes(payload)
    before = set(sys.modules)
    for path in [*files, tmp_path / "plain.pkl"]:
        try:
            found = load_file(path)
        except UserError:
            pass
        else:
            assert found.placeholders or name == "only an import"
        assert not marker.exists(), f"{name} ran from {path.name}"
    assert EVIL not in set(sys.modules) - before
    with contextlib.suppress(Exception):  # the control: Python's own unpickler does run it
        pickle.loads(payload)
    assert marker.exists(), f"{name} is no attack, so the test proves nothing"


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_attack_beside_honest_weights_leaves_the_weights(container: str, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = write({"state_dict": STATE, "more": [Evil(), {"deep": (Evil(),)}]}, tmp_path / "m.pth", container)
    found = load_file(path)
    assert torch.equal(found.value["state_dict"]["weight"], STATE["weight"])
    assert found.placeholders == ("posix.system",) and not (tmp_path / "ran").exists()


def test_placeholders_do_nothing(tmp_path: Path):
    path = write({"args": argparse.Namespace(a=1)}, tmp_path / "m.pth", "zip")
    thing = load_file(path).value["args"]
    assert repr(thing) == "<argparse.Namespace, not loaded>" and thing.state == {"a": 1}
    with pytest.raises(TypeError):
        thing()
    with pytest.raises(AttributeError):
        _ = thing.a


# ------------------------------------------------------------------ sizes that lie


def patched(path: Path, old: bytes, new: bytes, container: str) -> Path:
    """The file with `old` in its pickle replaced by `new`."""
    if container == "legacy":
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        return path
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name.endswith("/data.pkl"):
                assert data.count(old) == 1
                data = data.replace(old, new)
            archive.writestr(name, data)
    return path


HUGE = b"\x8a\x06" + (1 << 42).to_bytes(6, "little")  # LONG1


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_storage_that_says_terabytes_allocates_nothing(container: str, tmp_path: Path):
    path = write({"w": torch.zeros(0x1234)}, tmp_path / "m.pth", container)
    # M\x34\x12 is the number of elements: in the storage's description, then in the tensor's size
    data = path.read_bytes()
    assert data.count(b"M\x34\x12") == 2
    where = data.index(b"M\x34\x12")
    around = data[where - 6 : where + 3]
    patched(path, around, around[:-3] + HUGE, container)
    with pytest.raises(UserError, match=r"storage .* says 17592186044416 bytes, the (file has|archive) \d+"):
        load_file(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tensor_larger_than_its_storage_is_refused(container: str, tmp_path: Path):
    path = write({"w": torch.zeros(0x1234)}, tmp_path / "m.pth", container)
    data = path.read_bytes()
    where = data.rindex(b"M\x34\x12")
    around = data[where : where + 8]
    patched(path, around, HUGE + around[3:], container)
    with pytest.raises(UserError, match=r"a tensor of size \(4398046511104,\) in a storage of 4660 elements"):
        load_file(path)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 42) + b".",  # bytearray of a given length
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 42) + b".",  # string of a given length
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 42) + b".",  # bytes of a given length
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo at a high index
        b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R.",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",  # a number of a billion bytes
        b"\x80\x02K\x00" + b"\x85" * 200_000 + b"}q\x000K\x01h\x00s.",  # nested tuples
        b"\x80\x02" + b"K\x00" + b"\x85" * 200_000 + b"\x94}h\x00K\x01s.",  # and as a key
        b"\x80\x02" + b"(" * 100_000 + b".",
    ],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_other_bombs_end_in_an_error_or_do_nothing(payload: bytes, container: str, tmp_path: Path):
    path = with_pickle(payload, tmp_path / "m.pth", container)
    try:
        assert load_file(path).placeholders
    except UserError as error:
        assert "MemoryError" not in str(error)


def test_compressed_records_are_refused(tmp_path: Path):
    path = write({"w": torch.zeros(1_000_000)}, tmp_path / "m.pth", "zip")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed"):
        load_file(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_damaged_files_are_refused_or_read_never_more(container: str, tmp_path: Path):
    path = write({"state_dict": STATE, "args": argparse.Namespace(x=[1, 2])}, tmp_path / "m.pth", container)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        try:
            load_file(path)
        except UserError:
            refused += 1
    assert refused > 30


# ------------------------------------------------------------------ what is no checkpoint


def test_what_else_a_file_may_be(tmp_path: Path):
    path = tmp_path / "m.pth"

    def says(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            load_file(path)
        return str(error.value)

    assert "empty" in says(b"")
    assert "git lfs pull" in says(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "web page" in says(b"<!DOCTYPE html><html></html>")
    assert "JSON" in says(b'{"a": 1}')
    for packed in (gzip.compress(b"1"), bz2.compress(b"1"), lzma.compress(b"1")):
        assert "unpack it with" in says(packed)
    assert "HDF5" in says(b"\x89HDF\r\n\x1a\n" + bytes(64))
    assert "ONNX" in says(b"\x08\x08\x12\x07pytorch" + bytes(64))
    assert "NumPy array" in says(b"\x93NUMPY\x01\x00" + bytes(64))
    assert "pieces" in says(b'{"metadata": {}, "weight_map": {}}')
    assert ".npz" in says(npz())
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    assert "TorchScript" in says(scripted.getvalue())
    module = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), module, _use_new_zipfile_serialization=False)
    assert load_whole(module.getvalue(), path) in ("placeholders", "refused")
    with pytest.raises(UserError, match="no such file"):
        load_file(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is a folder"):
        load_file(tmp_path)
    save_file(STATE, tmp_path / "m.safetensors")
    cut = (tmp_path / "m.safetensors").read_bytes()[:-5]
    (tmp_path / "m.safetensors").write_bytes(cut)
    with pytest.raises(UserError, match="damaged"):
        load_file(tmp_path / "m.safetensors")


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def test_what_a_folder_may_be(tmp_path: Path):
    def says(*names: str) -> str:
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"x")
        with pytest.raises(UserError) as error:
            load_file(folder)
        return str(error.value)

    assert "dcp_to_torch" in says(".metadata", "__0_0.distcp")
    assert "in 2 pieces" in says("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert "zero_to_fp32.py" in says("mp_rank_00_model_states.pt")
    assert "name the weight file in it: a.pth" in says("a.pth", "notes.txt")


# ------------------------------------------------------------------ damage and bombs


def test_half_a_record_zeroed_is_named_as_damage(tmp_path: Path):
    path = spoilt(write({"w": torch.rand(1000)}, tmp_path / "m.pth", "zip"), "m/data/0")
    with pytest.raises(UserError, match=r"checksum of its record 'm/data/0' does not match.*damaged"):
        load_file(path)


def test_a_file_written_without_checksums_is_read(tmp_path: Path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        path = write(STATE, tmp_path / "m.pth", "zip")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_file(path).value["weight"], STATE["weight"])


def test_names_equal_but_for_capitals_are_refused(tmp_path: Path):
    path = write(STATE, tmp_path / "m.pth", "zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("m/DATA.PKL", b"\x80\x02N.")
    with pytest.raises(UserError, match=r"'m/data.pkl' more than once"):
        load_file(path)


def growing_name(n: int) -> bytes:
    """A class called, the result called ...: with a naive name its length grows with each call."""
    return b"\x80\x02ca\nb\n" + b")R" * n + b"."


def long_name(n: int) -> bytes:
    """One long module name, used again and again."""
    return b"\x80\x04X" + struct.pack("<I", n) + b"m" * n + b"\x94" + b"h\x00h\x00\x93" * n + b"."


BOMBS = {
    "a name that grows": growing_name(90_000),
    "a long name, often": long_name(30_000),
    "a tuple as a key": b"\x80\x04}X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"\x94("
    + b"h\x00" * 100_000 + b"tK\x01s.",
    "a long key": b"\x80\x04}X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"K\x01s.",
    "a huge number as a key": b"\x80\x02}\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"K\x01s.",
    "bytes made again and again": b"\x80\x02X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"q\x00c_codecs\nencode\n"
    b"q\x01(" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 5000 + b"t.",
    "a list copied again and again": b"\x80\x02](" + b"K\x00K\x00\x86" * 50_000 + b"eq\x00ccollections\n"
    b"OrderedDict\nq\x01(" + b"h\x01h\x00\x85R" * 50_000 + b"t.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_memory_stays_in_proportion_to_the_file(name: str, container: str, tmp_path: Path):
    path = tmp_path / "m.pth"
    if container == "plain":
        path.write_bytes(BOMBS[name])
    else:
        with_pickle(BOMBS[name], path, container)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            repr(load_file(path).placeholders)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80 * path.stat().st_size + (1 << 26)


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path: Path):
    path = write(STATE, tmp_path / "m.pth", "legacy")
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="mostly a hole"):
        load_file(path)


def test_torch_load_is_called_in_no_place_that_reads_a_strangers_file():
    """pretrain reads its own checkpoint in its own folder; export proves the file it has just written."""
    root = Path(__file__).parents[3]
    found = {
        path.relative_to(root).as_posix()
        for package in ("pretrain", "transfer", "slurm")
        for path in (root / package).rglob("*.py")
        if re.search(
            r"torch\.load\(|\bpickle\.loads?\(|Unpickler\(pickle\.Unpickler|np\.load\([^)]*allow_pickle=True",
            path.read_text(),
        )
    }
    assert found == {"pretrain/checkpoint.py", "transfer/export.py"}


def load_whole(data: bytes, path: Path) -> str:
    """A whole pickled module: its class is not imported."""
    path.write_bytes(data)
    try:
        return "placeholders" if load_file(path).placeholders else "loaded"
    except UserError:
        return "refused"


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.pth")  # opening it would wait for a writer
    for path, kind in ((tmp_path / "pipe.pth", "a pipe"), (Path("/dev/zero"), "a device or socket")):
        assert main(["inspect", "--weights", str(path)]) == 2
        assert f"{path} is no file ({kind})" in capsys.readouterr().err
