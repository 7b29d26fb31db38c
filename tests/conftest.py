"""Real images for the tests: the folder BENCH_TEST_DATA where it is set, else Fashion-MNIST."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from jsonschema import Draft202012Validator

from pretrain.common.signals import StopSignals
from tests.helpers.image_folders import copy_first
from transfer.evaluation import results

TRAIN_PER_CLASS, TEST_PER_CLASS = 64, 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """TEST_ORDER=SEED: files, and the tests of each, in a random order."""
    if (seed := os.environ.get("TEST_ORDER")) is None:
        return
    files = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.path)]
    order = random.Random(int(seed))
    order.shuffle(files)
    for file in files:
        order.shuffle(file)
    items[:] = itertools.chain(*files)


def pytest_collection_finish() -> None:
    """What the imports made stays: a collection need not look at it again, nor a forked process copy it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Several test workers share the cores: one torch thread each, here and in what tests start.

    TEST_THREADS: so many, for tests/matrix.py.
    """
    threads = os.environ.get("TEST_THREADS", "1")
    torch.set_num_threads(int(threads))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    # OpenMP's other threads are not in a forked child, which would wait for them.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heeded() -> None:
    """A shell without job control has its background jobs ignore it, and what they start as well."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _results_follow_their_schema() -> Iterator[None]:
    """Every line that a test writes into a results.jsonl is one of docs/results.schema.json."""
    schema = Path(__file__).parents[1] / "docs/results.schema.json"
    validator = Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))
    write = results.append_jsonl

    def checked(path: Path, *lines: dict[str, Any]) -> None:
        for line in lines:
            validator.validate(json.loads(json.dumps(line)))
        write(path, *lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "append_jsonl", checked)
        yield


@pytest.fixture(autouse=True)
def _no_signal_heard() -> Iterator[None]:
    """What one test's process heard is nothing to the next test, in whatever order they run."""
    yield
    StopSignals.heard = None


def _shared_once(name: str, make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made once for all workers of a run: the others wait for the one that makes it."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    final = root / name
    with FileLock(root / f"{name}.lock"):
        if not final.exists():
            aside = tmp_path_factory.mktemp(name)
            make(aside)
            aside.rename(final)
    return final


def _archive(name: str) -> Path | None:
    folder = os.environ.get("BENCH_TEST_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """The four Fashion-MNIST files, wherever `make demo` would find or put them."""
    from pretrain.common.errors import UserError
    from pretrain.data.fashion_mnist import find_or_fetch

    try:
        return find_or_fetch()
    except UserError as error:
        pytest.skip(f"Fashion-MNIST is not to be had: {error}")


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """{train,test}/<10 classes>/*.jpg: 64 and 16 real images a class (CIFAR-10, else Fashion-MNIST)."""

    def make(folder: Path) -> None:
        archive = _archive("cifar10-images.tar.gz")
        if archive is not None:
            _unpack_some_cifar(archive, folder)
        else:
            _write_some_fashion_mnist(request.getfixturevalue("fashion_mnist_dir"), folder)

    return _shared_once("cifar_folder", make, tmp_path_factory)


@pytest.fixture(scope="session")
def few_images(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 and 2 images a class of `cifar_folder`: as many as the largest k of a k-NN protocol wants."""

    def make(folder: Path) -> None:
        copy_first(cifar_folder / "train", folder / "train", 20)
        copy_first(cifar_folder / "test", folder / "test", 2)

    return _shared_once("few_images", make, tmp_path_factory)


def _unpack_some_cifar(archive: Path, folder: Path) -> None:
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4:
                continue
            _, split, name, file = parts
            limit = TRAIN_PER_CLASS if split == "train" else TEST_PER_CLASS
            if taken.get((split, name), 0) >= limit:
                continue
            taken[split, name] = taken.get((split, name), 0) + 1
            target = folder / split / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            data = tar.extractfile(member)
            assert data is not None
            target.write_bytes(data.read())


def _write_some_fashion_mnist(source: Path, folder: Path) -> None:
    from pretrain.data.datasets import open_dataset

    for split, limit in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        data = open_dataset("fashion_mnist", source, split)
        for label, name in enumerate(data.classes):
            target = folder / split / name.replace("/", "-").replace(" ", "-")
            target.mkdir(parents=True)
            for i in (data.labels_N == label).nonzero()[0][:limit]:
                data.image(int(i)).resize((32, 32)).save(target / f"{i:05d}.jpg", quality=95)


@pytest.fixture(scope="session")
def coco_mini(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """images/ and instances.json in COCO's format: 128 COCO images, else composed scenes."""

    def make(folder: Path) -> None:
        archive = _archive("coco-mini.tar.gz")
        if archive is not None:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            inner = folder / "coco-mini"
            (inner / "images").rename(folder / "images")
            (inner / "instances.json").rename(folder / "instances.json")
        else:
            from transfer.detection.scenes import compose

            compose(request.getfixturevalue("fashion_mnist_dir"), folder, train=0, test=64, size=160, seed=0)
            (folder / "test").rename(folder / "images")
            (folder / "test.json").rename(folder / "instances.json")

    return _shared_once("coco_mini", make, tmp_path_factory)
