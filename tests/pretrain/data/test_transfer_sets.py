"""Transfer sets in torchvision's layouts: every item beside torchvision's, missing parts, their metric."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
import yaml
from scipy.io import savemat
from sklearn.metrics import balanced_accuracy_score

from pretrain.common.errors import UserError
from pretrain.data.datasets import CLASS_COUNTS, DATASETS, ImageDataset, open_dataset
from pretrain.data.transfer_sets import SETS, class_wise, metric_of
from tests.helpers.forked import run_command
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_resnet import save_tiny
from transfer.evaluation import results
from transfer.evaluation.accuracy import accuracy, percentages, places
from transfer.evaluation.local_copy import stage
from transfer.evaluators import linear, semisup
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group

Put = Callable[[Path], None]
PINNED = ("/x/a/2", "/x/a/7", "/x/b/6", "/x/b/2")


def lines(path: Path, text: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def flowers102(root: Path, put: Put) -> None:
    base = root / "flowers-102"
    for i in range(1, 409):
        put(base / "jpg" / f"image_{i:05d}.jpg")
    ids = np.random.default_rng(0).permutation(np.arange(1, 409))  # of four of each class, as is the original
    labels = np.arange(408) % 102 + 1
    order = ids[np.argsort(labels[ids - 1], kind="stable")].reshape(102, 4)
    savemat(base / "imagelabels.mat", {"labels": labels[None]})
    parts = {"trnid": order[:, 0], "valid": order[:, 1], "tstid": order[:, 2:].ravel()}
    savemat(base / "setid.mat", {k: v[None] for k, v in parts.items()})


def pets(root: Path, put: Put) -> None:
    """Three images a class to train on; one to three, in turn, to judge: of every other class the same."""
    base = root / "oxford-iiit-pet"
    breeds = [f"{'Breed' if c % 3 else 'breed'}_{c:02d}" for c in range(37)]
    for split, first, count in (("trainval", 1, lambda c: 3), ("test", 101, lambda c: 1 + c % 3)):
        rows = [(f"{b}_{first + i}", c) for c, b in enumerate(breeds) for i in range(count(c))]
        lines(base / "annotations" / f"{split}.txt", [f"{name} {c + 1} {c % 2 + 1} 1" for name, c in rows])
        for name, c in rows:
            put(base / "images" / f"{name}.jpg")
            if split == "test" and c % 2:
                known = base / "images" / f"{breeds[c]}_{int(name[-3:]) - 100}.jpg"
                shutil.copyfile(known, base / "images" / f"{name}.jpg")


def food101(root: Path, put: Put) -> None:
    base = root / "food-101"
    for split in ("train", "test"):
        listed = {f"dish_{c:03d}": [f"dish_{c:03d}/{split}{c}"] for c in reversed(range(101))}
        lines(base / "meta" / f"{split}.json", [json.dumps(listed)])
        for (name,) in listed.values():
            put(base / "images" / f"{name}.jpg")


def dtd(root: Path, put: Put) -> None:
    base = root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        names = [f"texture{c:02d}/texture{c:02d}_{split}.jpg" for c in range(47)]
        lines(base / "labels" / f"{split}1.txt", names)
        for name in names:
            put(base / "images" / name)


def aircraft(root: Path, put: Put) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    variants = [f"Make {c:02d}-{c}" for c in range(100)]
    lines(base / "variants.txt", variants)
    for s, split in enumerate(("trainval", "test")):
        rows = [(f"{s}{c:06d}", v) for c, v in enumerate(variants)]
        lines(base / f"images_variant_{split}.txt", [f"{name} {v}" for name, v in rows])
        for name, _ in rows:
            put(base / "images" / f"{name}.jpg")


def stl10(root: Path, put: Put) -> None:
    base = root / "stl10_binary"
    lines(base / "class_names.txt", [f"thing{c}" for c in range(10)])
    rng = np.random.default_rng(1)
    for split, n in (("train", 20), ("test", 30)):
        rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(base / f"{split}_X.bin")
        (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(base / f"{split}_y.bin")


def eurosat(root: Path, put: Put) -> None:
    for c in ["AnnualCrop", *(f"Land{c}" for c in range(8)), "SeaLake"]:
        for i in range(1, 11):
            put(root / "eurosat" / "2750" / c / f"{c}_{i}.jpg")


def caltech101(root: Path, put: Put) -> None:
    base = root / "caltech101" / "101_ObjectCategories"
    for c, name in enumerate(["BACKGROUND_Google", "accordion", *(f"thing{c:03d}" for c in range(100))]):
        for i in range(1, 32 + c % 2):
            put(base / name / f"image_{i:04d}.jpg")


def sun397(root: Path, put: Put) -> None:
    base = root / "SUN397"
    names = [f"/{chr(97 + c % 26)}/scene{c}" + ("/indoor" if c % 5 == 0 else "") for c in range(397)]
    lines(base / "ClassName.txt", names)
    for file, tag in (("Training_01.txt", "a"), ("Testing_01.txt", "b"), ("unused.txt", "c")):
        listed = [f"{name}/sun_{tag}{c}.jpg" for c, name in enumerate(names)]
        if file != "unused.txt":
            lines(base / "Partitions" / file, listed)
        for name in listed:
            put(base / name[1:])


def places365(root: Path, put: Put) -> None:
    names = [f"/{chr(97 + c // 15)}/place{c:03d}" for c in range(365)]
    lines(root / "categories_places365.txt", [f"{name} {c}" for c, name in enumerate(names)])
    train = [f"{name}/0000000{c % 10}.jpg" for c, name in enumerate(names)]
    val = [f"Places365_val_{c:08d}.jpg" for c in range(365)]
    lines(root / "places365_train_standard.txt", [f"{n} {c}" for c, n in enumerate(train)])
    lines(root / "places365_val.txt", [f"{n} {364 - c}" for c, n in enumerate(val)])
    for name in train:
        put(root / "data_256_standard" / name[1:])
    for name in val:
        put(root / "val_256" / name)


BUILD = {
    f.__name__: f
    for f in (
        flowers102, pets, food101, dtd, aircraft, stl10, eurosat, caltech101, sun397, places365,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def put(cifar_folder: Path) -> Put:
    """Puts the next of 640 real images at a path; all different."""
    images = sorted((cifar_folder / "train").rglob("*.jpg"))
    count = iter(range(1 << 30))

    def link(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images[next(count) % len(images)], path)

    return link


@pytest.fixture(scope="module")
def roots(put: Put, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """torchvision's root of every set, small."""
    made = {name: tmp_path_factory.mktemp(name) for name in BUILD}
    for name, build in BUILD.items():
        build(made[name], put)
    return made


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _checksums(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision's checksums become those of the small files; its checks stay."""
    base = roots["flowers102"] / "flowers-102"
    known = {k: (f, m if k == "image" else md5(base / f)) for k, (f, m) in tv.Flowers102._file_dict.items()}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", known)
    base = roots["stl10"] / "stl10_binary"
    for part in ("train_list", "test_list"):
        files = [[f, md5(base / f) if (base / f).exists() else m] for f, m in getattr(tv.STL10, part)]
        monkeypatch.setattr(tv.STL10, part, files)
    base, meta = roots["places365"], tv.Places365._FILE_LIST_META
    known = {k: (f, md5(base / f) if (base / f).exists() else m) for k, (f, m) in meta.items()}
    monkeypatch.setattr(tv.Places365, "_FILE_LIST_META", known)
    file = "categories_places365.txt"
    monkeypatch.setattr(tv.Places365, "_CATEGORIES_META", (file, md5(base / file)))
    yield


def reference(name: str, root: Path, split: str) -> list[torch.utils.data.Dataset]:
    """torchvision's own objects whose items, one after the other, a part must have."""
    train = split == "train"
    kinds = {
        "flowers102": lambda: [tv.Flowers102(root, s) for s in (("train", "val") if train else ("test",))],
        "pets": lambda: [tv.OxfordIIITPet(root, "trainval" if train else "test")],
        "food101": lambda: [tv.Food101(root, split)],
        "dtd": lambda: [tv.DTD(root, s, partition=1) for s in (("train", "val") if train else ("test",))],
        "aircraft": lambda: [tv.FGVCAircraft(root, "trainval" if train else "test")],
        "places365": lambda: [tv.Places365(root, "train-standard" if train else "val", small=True)],
    }
    return kinds[name]()


def assert_same(data: ImageDataset, i: int, item: tuple) -> None:
    image, label = item
    assert int(data.labels_N[i]) == label
    np.testing.assert_array_equal(np.asarray(data.image(i)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["flowers102", "pets", "food101", "dtd", "aircraft", "places365"])
def test_every_item_is_torchvisions(name: str, split: str, roots: dict[str, Path]) -> None:
    data, parts = open_dataset(name, roots[name], split), reference(name, roots[name], split)
    items = [item for part in parts for item in (part[i] for i in range(len(part)))]
    assert len(data) == len(items) > 0
    for i, item in enumerate(items):
        assert_same(data, i, item)
    assert data.classes == list(parts[0].classes) and len(data.classes) == CLASS_COUNTS[name]
    assert np.array_equal(np.unique(data.labels_N), np.arange(len(data.classes)))
    assert all((data.root / f).is_file() for f in data.files)


@pytest.mark.parametrize("split", ["train", "test"])
def test_stl10_needs_no_unlabelled_images(split: str, roots: dict[str, Path], monkeypatch) -> None:
    data = open_dataset("stl10", roots["stl10"], split)
    monkeypatch.setattr(tv.STL10, "_check_integrity", lambda self: True)  # it wants the unlabelled ones, too
    theirs = tv.STL10(str(roots["stl10"]), split)
    assert len(data) == len(theirs) == (20 if split == "train" else 30)
    for i in range(len(theirs)):
        assert_same(data, i, theirs[i])
    assert data.classes == theirs.classes and data.native_size is None


@pytest.mark.parametrize("name", ["eurosat", "caltech101", "sun397"])
def test_a_set_without_splits_is_parted(name: str, roots: dict[str, Path]) -> None:
    root, known = roots[name], SETS[name]
    whole = getattr(tv, known.kind)(str(root))
    base = root / known.folder
    if name == "eurosat":
        files = [path for path, _ in whole.samples]
    elif name == "caltech101":
        folder = [whole.categories[y] for y in whole.y]
        files = [str(base / f / f"image_{i:04d}.jpg") for f, i in zip(folder, whole.index)]
    else:
        files = [str(f) for f in whole._image_files]
    index = {os.path.relpath(f, base): i for i, f in enumerate(files)}
    train, test = (open_dataset(name, root, split) for split in ("train", "test"))
    assert not set(train.files) & set(test.files)
    for data in (train, test):
        for i, file in enumerate(data.files):
            assert_same(data, i, whole[index[file]])
    each = [np.bincount(d.labels_N, minlength=known.classes) for d in (train, test)]
    if name == "eurosat":
        assert set(train.files) | set(test.files) == set(index)
        assert each[0].tolist() == [8] * 10 and each[1].tolist() == [2] * 10  # 80 % of ten
    elif name == "caltech101":
        assert set(train.files) | set(test.files) == set(index) and "BACKGROUND_Google" not in train.classes
        assert each[0].tolist() == [30] * 101 and set(each[1].tolist()) == {1, 2}  # of 31 and 32
    else:
        partitions = base / "Partitions"
        for data, file in ((train, "Training_01.txt"), (test, "Testing_01.txt")):
            assert [f"/{f}" for f in data.files] == (partitions / file).read_text().split()


def test_the_split_made_here_is_fixed() -> None:
    # Of sha256("0 a/1") ..., the two that come first in each class; computed here with nothing but hashlib.
    files = [f"/x/{c}/{i}" for c in "ab" for i in range(9)]
    first = {
        f"/x/{c}/{i}"
        for c in "ab"
        for i in sorted(range(9), key=lambda i: hashlib.sha256(f"0 {c}/{i}".encode()).hexdigest())[:2]
    }
    chosen = class_wise(Path("/x"), files, [0] * 9 + [1] * 9, lambda n: 2)
    assert {f for f, c in zip(files, chosen) if c} == first
    assert first == set(PINNED)
    # One image less changes the place of one other at most.
    less = [f for f in files if f != next(iter(sorted(first)))]
    again = class_wise(Path("/x"), less, [0 if "/a/" in f else 1 for f in less], lambda n: 2)
    assert len(first - {f for f, c in zip(less, again) if c}) == 1


@pytest.mark.parametrize("name", SETS)
def test_the_folder_may_be_the_sets_own_renamed_or_staged(
    name: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    wanted = open_dataset(name, roots[name], "test")
    (tmp_path / "renamed").symlink_to(wanted.root)
    for folder in (wanted.root, tmp_path / "renamed", stage(wanted.root, tmp_path / "node")):
        data = open_dataset(name, folder, "test")
        assert data.fingerprint == wanted.fingerprint and data.files == wanted.files
    assert open_dataset(name, roots[name], "train").fingerprint != wanted.fingerprint
    with data.open(0) as opened:
        image = opened.decode((16, 16))  # a JPEG's draft, as for any folder
    assert image.mode == "RGB"


@pytest.mark.parametrize(("name", "need"), [(name, need) for name, s in SETS.items() for need in s.needs])
def test_a_missing_part_is_named(name: str, need: str, roots: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "root" / SETS[name].folder
    shutil.copytree(roots[name] / SETS[name].folder, base, copy_function=os.link)
    (gone,) = (p for p in (base / n for n in need.split(" or ")) if p.exists())
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    for folder in (base, tmp_path / "root"):
        with pytest.raises(UserError) as error:
            open_dataset(name, folder, "test")
        said = str(error.value)
        assert str(base) in said and f"lacks {need}; wanted {SETS[name].needs[0]}" in said
        assert SETS[name].title in said and f"torchvision.datasets.{SETS[name].kind}(DIR" in said


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_folder_is_told_the_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_dataset(name, tmp_path, "train")
    assert f"holds no {SETS[name].title}; wanted {tmp_path}/{SETS[name].layout}" in str(error.value)
    assert not list(tmp_path.iterdir())  # torchvision's Caltech101 would have made a folder


def copied(name: str, roots: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(roots[name], tmp_path / "copy")
    return tmp_path / "copy" / SETS[name].folder


def test_damage_is_explained_in_our_words(roots: dict[str, Path], tmp_path: Path) -> None:
    for name, file in (
        ("flowers102", "setid.mat"),
        ("stl10", "test_X.bin"),
        ("places365", "places365_val.txt"),
    ):
        base = copied(name, roots, tmp_path / name)
        (base / file).write_bytes((base / file).read_bytes()[:50])
        with pytest.raises(UserError, match="wrong checksum") as error:
            open_dataset(name, base, "test")
        assert "download=True" not in str(error.value)
    base = copied("food101", roots, tmp_path / "food")
    (base / "meta" / "test.json").write_text("{")
    with pytest.raises(UserError, match=r"not Food-101 as torchvision.*JSONDecodeError"):
        open_dataset("food101", base, "test")
    base = copied("aircraft", roots, tmp_path / "aircraft")
    lines(base / "data" / "images_variant_test.txt", ["1000000 No Such Plane"])
    with pytest.raises(UserError, match="No Such Plane"):
        open_dataset("aircraft", base, "test")


def test_missing_images_and_classes_are_counted(roots: dict[str, Path], tmp_path: Path) -> None:
    base = copied("dtd", roots, tmp_path / "a")
    shutil.rmtree(base / "images" / "texture07")
    with pytest.raises(
        UserError, match=r"Desc.* lacks 1 of its 47 test images .images/texture07/texture07_test"
    ):
        open_dataset("dtd", base, "test")
    base = copied("dtd", roots, tmp_path / "b")
    names = (base / "labels" / "test1.txt").read_text().split()
    lines(base / "labels" / "test1.txt", names[:-1])
    with pytest.raises(UserError, match="has 46 classes, dtd has 47"):
        open_dataset("dtd", base, "test")
    base = copied("caltech101", roots, tmp_path / "c")
    (base / "thing003" / "image_0002.jpg").unlink()  # torchvision counts files and makes up names
    with pytest.raises(UserError, match="thing003/image_0002"):
        [open_dataset("caltech101", base, split) for split in ("train", "test")]


def test_places_takes_large_images_where_small_ones_are_not_whole(roots, tmp_path: Path) -> None:
    base = copied("places365", roots, tmp_path)
    assert open_dataset("places365", base, "test").notes[0] == "256 px"
    for old, new in (("data_256_standard", "data_large_standard"), ("val_256", "val_large")):
        shutil.copytree(base / old, base / new)
    shutil.rmtree(base / "val_256")
    for split, folder in (("train", "data_large_standard/"), ("test", "val_large/")):
        data = open_dataset("places365", base, split)
        assert data.notes[0] == "large images" and data.files[0].startswith(folder)


def test_results_say_which_split_it_is(roots: dict[str, Path]) -> None:
    assert open_dataset("dtd", roots["dtd"], "train").notes == ("split 1", "94 of 3,760 train images")
    for name, known in SETS.items():
        assert (metric_of(name), name in DATASETS) == (known.metric, True)
    assert metric_of("imagenet") == "top1"
    kept = {name for name, known in SETS.items() if known.metric == "mean_per_class"}
    assert kept == {"flowers102", "pets", "aircraft", "caltech101"}


def unbalanced(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Bank and queries of 12 classes, of which one has no query and others one to thirty."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, 16))
    bank_labels = rng.integers(0, 12, 300)
    query_labels = rng.permutation(np.repeat(np.arange(1, 12), [1, 30, 2, 25, 3, 9, 9, 4, 30, 1, 7]))
    bank, queries = (centres[y] + 1.3 * rng.normal(size=(len(y), 16)) for y in (bank_labels, query_labels))
    return bank, bank_labels, queries, query_labels


def test_mean_per_class_is_scikit_learns_balanced_accuracy(monkeypatch) -> None:
    bank, bank_labels, queries, truth = unbalanced()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    said = bank_labels[(unit[1] @ unit[0].T).argmax(1)]
    wanted = 100 * balanced_accuracy_score(truth, said)
    for block in (1 << 27, 2000):
        monkeypatch.setattr("transfer.evaluators.nearest.BLOCK_BYTES", block)
        got = knn_evaluate(bank, bank_labels, queries, truth, ks=[5, 1], per_class=True)
        assert got["mean_per_class_k1"] == pytest.approx(wanted)
    assert got["top1_k1"] == pytest.approx(100 * (truth == said).mean())
    assert abs(got["top1_k1"] - wanted) > 2
    plain = knn_evaluate(bank, bank_labels, queries, truth, ks=[5, 1])
    assert plain == {k: v for k, v in got.items() if k.startswith("top")}

    logits, labels = torch.randn(len(truth), 12, dtype=torch.float64), torch.from_numpy(truth) - 1
    logits[torch.arange(len(truth)), labels] += torch.linspace(0, 4, len(truth), dtype=torch.float64)
    wanted = 100 * balanced_accuracy_score(labels, logits.argmax(1))
    assert accuracy(logits, labels)["mean_per_class"] == pytest.approx(wanted)
    assert percentages(places(logits, labels), labels, 11)["mean_per_class"] == pytest.approx(wanted)


def knn_here(folder: Path) -> None:
    parts = unbalanced()
    torch.save(knn_evaluate(*parts, ks=[1, 7], per_class=True), folder / f"{os.environ['RANK']}.pt")


def test_two_ranks_have_the_mean_per_class_of_one(tmp_path: Path) -> None:
    wanted = knn_evaluate(*unbalanced(), ks=[1, 7], per_class=True)
    run_on_ranks(2, knn_here, tmp_path)
    for r in range(2):
        assert torch.load(tmp_path / f"{r}.pt") == pytest.approx(wanted, abs=1e-9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "w.safetensors", image_size=32)


def call(main: Callable[[list[str]], int | None], words: list[str], output: Path) -> None:
    assert main([*words, "--output", str(output)]) == 0


@pytest.mark.parametrize("task", ["linear", "semisup"])
def test_commands_on_two_ranks_judge_each_image_once(
    task: str, roots: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    values = {
        "linear": {
            "augmentation": False, "learning_rates": [0.05, 0.5], "held_out_percent": 30, "epochs": 20,
            "scaling": "standardise",
        },
        # a backbone that learnt would carry what two ranks round otherwise into its own next features
        "semisup": {"lr_backbone": {"100": 1e-6}, "lr_head": {"100": 0.1}, "sync_bn": True, "epochs": 2},
    }[task] | {"batch": 32}  # fmt: skip
    protocol = tmp_path / "mine@1.yaml"
    protocol.write_text(yaml.safe_dump({"task": task, "title": "t", "source": "s", "values": values}))
    words = [
        "--weights",
        str(weights),
        "--dataset",
        "pets",
        "--data-dir",
        str(roots["pets"]),
        "--workers",
        "0",
    ]
    words += ["--protocol", str(protocol), "--precision", "float32", "--image-size", "32"]
    words += ["--label-percent", "100"] if task == "semisup" else []
    main = linear.main if task == "linear" else semisup.main
    for world in (1, 2):
        run_on_ranks(world, call, main, words, tmp_path / str(world))
    one, two = (results.read(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert a.n == b.n == 73 and a.split.startswith("test (111 of 3,680 train images; 73 of 3,669")
        assert set(a.metrics) == {"top1", "top5", "mean_per_class"}
        assert a.metrics["top1"] > 10 or task == "semisup"  # chance: 3
        worth = 100 / 37  # rounding may move an image over a border: a class's only one, at most
        assert b.metrics["mean_per_class"] == pytest.approx(a.metrics["mean_per_class"], abs=worth + 1e-3)
    if task == "linear":
        held = one[1].settings
        assert held["held_out_mean_per_class"] == max(h["mean_per_class"] for h in held["sweep"])
        assert "held_out_top1" not in held
    else:
        epochs = json.loads((tmp_path / "1" / "epochs.json").read_text())
        best = max(e["mean_per_class"] for e in epochs)
        assert one[1].metrics["mean_per_class"] == pytest.approx(best, abs=1e-3)


def transfer(*words: str) -> str:
    done = run_command(["python", "-m", "transfer", *words])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_end_to_end_with_the_sets_metric_in_the_report(
    roots: dict[str, Path], tmp_path: Path
) -> None:
    """k-NN, linear heads and logistic regression on Pets, k-NN on DTD, as a user types them."""
    quick = tmp_path / "quick@1.yaml"
    values = {"method": "logreg", "augmentation": False, "scaling": "l2", "costs": [1, 100], "iterations": 20}
    values["held_out_percent"] = 30
    quick.write_text(yaml.safe_dump({"task": "linear", "title": "t", "source": "s", "values": values}))
    runs = tmp_path / "out"
    for task, protocol, name in (
        ("knn", "solo_knn@1", "pets"), ("linear", "cached_linear@1", "pets"),
        ("linear", str(quick), "pets"), ("knn", "solo_knn@1", "dtd"),
    ):  # fmt: skip
        words = ["--weights", "raw-pixels", "--protocol", protocol, "--image-size", "16", "--workers", "0"]
        words += ["--dataset", name, "--data-dir", str(roots[name])]
        folder = runs / f"{task}-{name}-{Path(protocol).stem}"
        said = transfer(task, *words, "--output", str(folder))
        assert ("mean_per_class" in said) == (name == "pets")
    found = group(collect([runs]))
    headlines = {(t.dataset, t.protocol): found.headline_metric(t) for t in found.tasks}
    assert headlines == {
        ("pets", "solo_knn@1"): "mean_per_class_k20", ("dtd", "solo_knn@1"): "top1_k20",
        ("pets", "cached_linear@1"): "mean_per_class", ("pets", "quick@1"): "mean_per_class",
    }  # fmt: skip
    transfer("report", str(runs), "--output", str(tmp_path / "report"))
    verdict = next((tmp_path / "report").rglob("verdict.csv")).read_text().splitlines()[0]
    assert (
        "k-NN mean per class, k = 20 (pets test" in verdict and "Linear mean per class (pets test" in verdict
    )
    assert "k-NN top-1, k = 20 (dtd test (split 1; 94 of 3,760 train images; 47 of 1,880 test" in verdict
