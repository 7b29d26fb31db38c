"""Features: right, in order, made once, never stale, taken up after a stop; transforms as torchvision's."""

from __future__ import annotations

import dataclasses
import importlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import transfer.evaluation.features
from pretrain.common.errors import UserError
from pretrain.common.signals import Stopped
from pretrain.data.datasets import open_dataset
from pretrain.network.model import build_backbone
from tests.helpers.forked import run_command
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation import feature_cache, results
from transfer.evaluation.features import Extractor, extract, extract_all, make_extractor
from transfer.evaluation.transforms import EvalTransform, ImageValues, eval_transform
from transfer.evaluators import knn
from transfer.options.commands import parse

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(size=32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    model = build_backbone("resnet18", zero_init_last=False).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    weights = {"path": "w", "sha256": "s", "format": "f", "branch": "online"}
    return Backbone(model=model.eval(), arch="resnet18", weights=weights, metadata={})


@pytest.fixture(scope="module")
def images(cifar_folder: Path):
    return open_dataset("cifar10", cifar_folder, "test")


def plain(backbone: Backbone, images, indices) -> torch.Tensor:
    """One image at a time with torchvision's transforms."""
    steps = v2.Compose([
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(TRANSFORM.mean, TRANSFORM.std),
    ])  # fmt: skip
    with torch.no_grad():
        return torch.cat([backbone.model(steps(images.image(int(i)))[None]) for i in indices])


def test_features_are_right_and_made_once(backbone, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "PART", 32)  # several parts
    extractor = Extractor(backbone.model, TRANSFORM, CPU, "float32")
    got = extract(extractor, backbone, images, cache=tmp_path, batch_size=20)
    assert isinstance(got, np.memmap) and got.shape == (160, 512)
    picks = [0, 47, 48, 159]
    torch.testing.assert_close(
        torch.from_numpy(got[picks]), plain(backbone, images, picks), rtol=1e-4, atol=1e-5
    )
    assert sorted(p.name for p in tmp_path.glob("*/*")) == ["features.npy", "lock", "meta.json"]
    monkeypatch.setattr(Extractor, "__call__", lambda *_: pytest.fail("extracted again"))
    np.testing.assert_array_equal(extract(extractor, backbone, images, cache=tmp_path), got)


def test_a_part_of_the_images_and_workers(backbone, images, tmp_path) -> None:
    extractor = Extractor(backbone.model, TRANSFORM, CPU, "float32")
    picks = np.array([5, 3, 100])
    some = extract(extractor, backbone, images, cache=tmp_path, indices=picks, workers=1)
    torch.testing.assert_close(
        torch.from_numpy(np.array(some)), plain(backbone, images, picks), rtol=1e-4, atol=1e-5
    )


def test_what_changed_is_extracted_anew(backbone, images, tmp_path, cifar_folder) -> None:
    def count(backbone=backbone, transform=TRANSFORM, images=images, precision="float32") -> int:
        extract(Extractor(None, transform, CPU, precision), backbone, images, cache=tmp_path / "cache")
        return len(list((tmp_path / "cache").glob("*/features.npy")))

    shutil.copytree(cifar_folder / "test", tmp_path / "test")
    copied = open_dataset("imagefolder", tmp_path, "test")
    assert count() == count() == 1
    assert count(backbone=dataclasses.replace(backbone, weights=backbone.weights | {"sha256": "t"})) == 2
    assert count(transform=dataclasses.replace(TRANSFORM, size=16)) == 3
    assert count(images=copied) == 4
    first = tmp_path / "test" / copied.key(0)
    Image.new("RGB", (32, 32)).save(first)
    assert count(images=open_dataset("imagefolder", tmp_path, "test")) == 5


def test_a_stopped_run_goes_on(backbone, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "PART", 16)
    wanted = np.array(
        extract(Extractor(None, TRANSFORM, CPU, "float32"), backbone, images, cache=tmp_path / "a")
    )
    seen: list[int] = []

    class Slow(Extractor):
        def __call__(self, pixels):
            seen.append(len(pixels))
            if len(seen) == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(pixels)

    extractor = Slow(None, TRANSFORM, CPU, "float32")
    with pytest.raises(Stopped):
        extract(extractor, backbone, images, cache=tmp_path / "b", batch_size=20)
    made = sum(len(np.load(part)["features"]) for part in (tmp_path / "b").glob("parts-*/*.npz"))
    assert 0 < made <= sum(seen) < 160
    before = sum(seen)
    got = extract(extractor, backbone, images, cache=tmp_path / "b", batch_size=20)
    np.testing.assert_array_equal(got, wanted)
    assert sum(seen) == before + 160 - made  # the finished parts were not made again


def test_damage_is_told_and_mended(
    backbone, images, tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    extractor = Extractor(None, TRANSFORM, CPU, "float32")
    wanted = np.array(extract(extractor, backbone, images, cache=tmp_path))
    (file,) = tmp_path.glob("*/features.npy")
    whole, meta = file.read_bytes(), file.with_name("meta.json").read_bytes()
    one_row = io.BytesIO()
    np.save(one_row, wanted[:1])
    for damaged in (whole[:4096] + bytes(len(whole) // 2), whole[:5000], b"", one_row.getvalue()):
        file.write_bytes(damaged + whole[len(damaged) :] if len(damaged) > 5000 else damaged)
        caplog.clear()
        np.testing.assert_array_equal(extract(extractor, backbone, images, cache=tmp_path), wanted)
        assert f"{file} is damaged" in caplog.text
        assert file.read_bytes() == whole
    for damaged in (meta[:50], b"[]", b"{}"):
        file.with_name("meta.json").write_bytes(damaged)
        np.testing.assert_array_equal(extract(extractor, backbone, images, cache=tmp_path), wanted)
    monkeypatch.setattr(Extractor, "__call__", lambda *_: pytest.fail("extracted again"))
    np.testing.assert_array_equal(extract(extractor, backbone, images, cache=tmp_path), wanted)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def stop_at_the_end(extractor, backbone, images, cache, monkeypatch) -> list[Path]:
    """All parts made, and killed before they were joined."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            feature_cache.FeatureFolder, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        extract(extractor, backbone, images, cache=cache)
    return sorted(cache.glob("parts-*/*.npz"))


def test_a_damaged_part_is_made_again(backbone, images, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(feature_cache, "PART", 16)
    seen: list[int] = []

    class Counted(Extractor):
        def __call__(self, pixels):
            seen.append(len(pixels))
            return super().__call__(pixels)

    extractor = Counted(None, TRANSFORM, CPU, "float32")
    wanted = np.array(extract(extractor, backbone, images, cache=tmp_path / "whole"))
    parts = stop_at_the_end(extractor, backbone, images, tmp_path / "cut", monkeypatch)
    assert len(parts) > 3
    sizes = [len(np.load(part)["features"]) for part in parts]
    content = parts[0].read_bytes()
    parts[0].write_bytes(content[:600] + bytes(300) + content[900:])  # half zeroed: the zip's checksum tells
    parts[1].write_bytes(b"")
    one_row = dict(np.load(parts[2]))
    np.savez(parts[2], **one_row | {"features": one_row["features"][:1]})  # must not stand for all its images
    seen.clear()
    np.testing.assert_array_equal(extract(extractor, backbone, images, cache=tmp_path / "cut"), wanted)
    assert sum(seen) == sum(sizes[:3])
    assert caplog.text.count("is damaged; its features are made again") == 2
    assert "holds (1, 3072) features" in caplog.text


def test_parts_without_the_changed_file_survive(
    backbone, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image added, removed or mended: only the parts that hold it are made again."""
    monkeypatch.setattr(feature_cache, "PART", 16)
    shutil.copytree(cifar_folder / "test", tmp_path / "test")
    extractor = Extractor(None, TRANSFORM, CPU, "float32")
    cache = tmp_path / "cache"

    def names() -> set[str]:
        data = open_dataset("imagefolder", tmp_path, "test")
        return {
            p.file.name for p in feature_cache.FeatureFolder.of(cache, {}, data, np.arange(len(data))).parts
        }

    before = names()
    assert len(before) >= 6
    data = open_dataset("imagefolder", tmp_path, "test")
    for change in ("remove", "add", "mend"):
        path = tmp_path / "test" / data.key(80)
        content = path.read_bytes()
        if change == "remove":
            path.unlink()
        elif change == "add":
            path.with_name("0.jpg").write_bytes(content)
        else:
            path.write_bytes(content + b"x")
        after = names()
        assert 1 <= len(before - after) <= 3, change
        if change == "add":
            path.with_name("0.jpg").unlink()
        path.write_bytes(content)
        before = names()
    # and what survives is taken: all but the changed part was made before the stop
    data = open_dataset("imagefolder", tmp_path, "test")
    stop_at_the_end(extractor, backbone, data, cache, monkeypatch)
    (tmp_path / "test" / data.key(80)).unlink()
    data = open_dataset("imagefolder", tmp_path, "test")
    seen: list[int] = []
    call = Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, x: seen.append(len(x)) or call(self, x))
    got = extract(extractor, backbone, data, cache=cache)
    assert 0 < sum(seen) < 80 and len(got) == 159
    np.testing.assert_array_equal(got, extract(extractor, backbone, data, cache=tmp_path / "anew"))


def test_all_broken_images_are_listed_and_what_was_made_is_kept(
    backbone, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(feature_cache, "PART", 16)
    shutil.copytree(cifar_folder, tmp_path / "data")
    train, test = (open_dataset("imagefolder", tmp_path / "data", split) for split in ("train", "test"))
    bad = [train.root / train.key(i) for i in (3, 600)] + [test.root / test.key(5)]
    good = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"no JPEG")
    train, test = (open_dataset("imagefolder", tmp_path / "data", split) for split in ("train", "test"))
    extractor = Extractor(None, TRANSFORM, CPU, "float32")
    both = [(train, None), (test, None)]
    with pytest.raises(UserError) as caught:
        extract_all(extractor, backbone, both, cache=tmp_path / "cache", max_broken=2)
    assert str(caught.value).startswith("3 images cannot be read and --max-broken-images is 2: ")
    assert all(str(path) in str(caught.value) and str(path) in caplog.text for path in bad)
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "__call__", lambda *_: pytest.fail("extracted again"))
        bank, queries = extract_all(extractor, backbone, both, cache=tmp_path / "cache", max_broken=3)
    assert bank.positions_N.tolist() == [i for i in range(640) if i not in (3, 600)]
    assert queries.x_ND.shape == (159, 3072) and list(queries.broken) == [5] and queries.split == "test"
    alone = extractor(TRANSFORM.decode(test.image(6))[None]).numpy()
    np.testing.assert_array_equal(queries.x_ND[5:6], alone)
    # mended in place, with the times of before: still noticed, as the size is another
    for path, content in zip(bad, good):
        path.write_bytes(content)
    test = open_dataset("imagefolder", tmp_path / "data", "test")
    assert extract(extractor, backbone, test, cache=tmp_path / "cache").shape == (160, 3072)


def test_where_images_are_decoded_every_epoch_all_must_be_readable(
    cifar_folder: Path, tmp_path: Path
) -> None:
    words = ["--weights", "none.pth", "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
    words += ["--output", str(tmp_path), "--max-broken-images", "1", "--protocol", "finetune@1"]
    with pytest.raises(UserError, match="fine-tuning decodes its images every epoch and wants"):
        parse("semisup", [*words, "--label-percent", "100"])
    with pytest.raises(UserError, match="wanted 0 or more"):
        parse("knn", [*words[:-4], "--max-broken-images", "-1", *words[-2:]])


def test_a_disk_that_is_too_small_is_told_before(backbone, images, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"0\.00 GB will be written \(features, in --cache-dir\)"):
        extract(Extractor(None, TRANSFORM, CPU, "float32"), backbone, images, cache=tmp_path)


@pytest.mark.parametrize(
    ("command", "protocol"), [("knn", "solo_knn@1"), ("linear", "logreg@1"), ("linear", "voc07_svm@1")]
)
def test_ranks_wait_for_hours_for_features_and_fits(
    command: str, protocol: str, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group(timeout_min: float = 30) -> None:
        raise Stopped(f"{timeout_min / 60} h")

    monkeypatch.setattr("transfer.evaluation.context.process_group", group)
    words = [command, "--weights", "raw-pixels", "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
    words += ["--protocol", protocol, "--output", str(tmp_path)]
    with pytest.raises(Stopped, match=r"24\.0 h"):
        importlib.import_module(f"transfer.evaluators.{command}").main(words[1:])


def test_one_rank_against_bfloat16_is_enough(backbone, images, monkeypatch) -> None:
    monkeypatch.setattr(transfer.evaluation.features, "computes_bfloat16", lambda _: True)
    assert make_extractor(backbone, images, TRANSFORM, CPU, "auto").precision == "bfloat16"
    asked: list[bool] = []

    def other_rank_disagrees(flag: bool, **_: object) -> bool:
        asked.append(flag)
        return len(asked) == 2  # both compute it natively; there it does not agree with float32

    monkeypatch.setattr(transfer.evaluation.features, "any_rank", other_rank_disagrees)
    assert make_extractor(backbone, images, TRANSFORM, CPU, "auto").precision == "float32"
    assert asked == [False, False]
    alone = make_extractor(backbone, images, TRANSFORM, CPU, "auto", over_ranks=False)
    assert alone.precision == "bfloat16" and len(asked) == 2


def test_nan_features_name_the_image(backbone, images, tmp_path) -> None:
    broken = build_backbone("resnet18")
    torch.nn.init.constant_(broken.conv1.weight, float("nan"))
    with pytest.raises(UserError, match=images.key(0)):
        extract(Extractor(broken.eval(), TRANSFORM, CPU, "float32"), backbone, images, cache=tmp_path)


def test_a_broken_image_met_by_a_worker_is_one_line(
    cifar_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(cifar_folder, data)
    broken = sorted((data / "train").rglob("*.jpg"))[123]
    broken.write_bytes(b"no JPEG")
    words = ["--weights", "raw-pixels", "--dataset", "imagefolder", "--data-dir", str(data), "--workers", "2"]
    words += ["--protocol", "solo_knn@1", "--output", str(output)]
    done = run_command(["python", "-m", "transfer", "knn", *words])
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert line.count(str(broken)) == 1 and "1 image cannot be read and --max-broken-images is 0: " in line
    assert "not a readable image (cannot identify image file);" in done.stderr
    assert "Traceback" not in done.stderr and "DataLoader" not in done.stderr
    assert not (output / "results.jsonl").exists()
    knn.main([*words, "--max-broken-images", "1"])
    (result,) = results.read(output)
    assert (result.n, result.settings["bank"], result.settings["unreadable"]) == (160, 639, {"train": 1})
    capsys.readouterr()
    knn.main([*words, "--max-broken-images", "2"])
    assert "finished already" in capsys.readouterr().out and results.read(output) == [result]


def test_bfloat16_keeps_the_neighbours(backbone, images) -> None:
    pixels = TRANSFORM.square([TRANSFORM.decode(images.image(i)) for i in range(0, 160, 2)])
    exact = Extractor(backbone.model, TRANSFORM, CPU, "float32")(pixels)
    fast = Extractor(backbone.model, TRANSFORM, CPU, "bfloat16")(pixels)
    centred, centred_fast = exact - exact.mean(0), fast - exact.mean(0)
    assert torch.cosine_similarity(centred, centred_fast).mean() > 0.99
    assert not torch.equal(exact, fast)
    # auto refuses bfloat16 where it disagrees
    transfer_agreement = transfer.evaluation.features.AGREEMENT
    try:
        transfer.evaluation.features.AGREEMENT = 0.0
        chosen = make_extractor(backbone, images, TRANSFORM, CPU, "auto")
    finally:
        transfer.evaluation.features.AGREEMENT = transfer_agreement
    assert chosen.precision == "float32"


@pytest.mark.parametrize("size", [(300, 200), (199, 333), (256, 256), (31, 70)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_torchvisions(size, interpolation) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    transform = eval_transform(
        ImageValues(interpolation=interpolation), native_size=None, image_size=None, metadata={}
    )
    wanted = v2.Compose([
        v2.Resize(256, interpolation=v2.InterpolationMode(interpolation)), v2.CenterCrop(224),
        v2.PILToTensor(),
    ])(image)  # fmt: skip
    assert torch.equal(transform.decode(image), wanted)


@pytest.mark.parametrize("resize", [256, None])
@pytest.mark.parametrize("size", [(500, 333), (300, 640), (100, 90)])
def test_squashing_is_torchvisions(size: tuple[int, int], resize: int | None) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    values = ImageValues(resize=resize, fit="squash")
    transform = eval_transform(values, native_size=None, image_size=None, metadata={})
    steps = (
        [v2.Resize(256)] if resize else []
    )  # VISSL: Resize(256), Resize([224, 224]); low-shot the second alone
    wanted = v2.Compose([*steps, v2.Resize([224, 224]), v2.PILToTensor()])(image)
    assert torch.equal(transform.decode(image), wanted) and transform.fit == "squash"
    assert torch.equal(transform.square([wanted, wanted])[1], wanted)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_batch_is_resized_as_pil_resizes_each_image(images, interpolation) -> None:
    transform = EvalTransform(size=48, interpolation=interpolation)
    batch = transform.square([transform.decode(images.image(i)) for i in range(20)])
    mode = getattr(Image.Resampling, interpolation.upper())
    wanted = np.stack([np.asarray(images.image(i).resize((48, 48), mode)) for i in range(20)])
    assert (
        np.abs(batch.permute(0, 2, 3, 1).numpy().astype(int) - wanted).max()
        <= {"bilinear": 1, "bicubic": 2}[interpolation]
    )


def test_a_protocol_may_fix_size_and_normalisation_and_the_user_has_the_last_word() -> None:
    values = ImageValues(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    recorded = {"image_size": "48", "mean": "0.1,0.2,0.3", "std": "1,2,4"}

    def look(values: ImageValues, **more) -> tuple:
        found = eval_transform(values, native_size=28, **{"image_size": None, "metadata": recorded, **more})
        return found.size, found.mean, found.std

    assert look(values) == (32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert look(values, image_size=40, given=["mean"]) == (40, (0.1, 0.2, 0.3), (0.25, 0.25, 0.25))
    assert look(ImageValues(image_size="native")) == (48, (0.1, 0.2, 0.3), (1, 2, 4))
    assert look(ImageValues(), metadata={})[0] == 28


def test_sizes_and_normalisation_from_the_metadata() -> None:
    metadata = {"image_size": "48", "mean": "0.1,0.2,0.3", "std": "1,2,4"}
    assert eval_transform(native_size=28, image_size=None, metadata=metadata).size == 48
    assert eval_transform(native_size=28, image_size=40, metadata=metadata).size == 40
    assert eval_transform(native_size=28, image_size=None, metadata={}).size == 28
    large = eval_transform(native_size=None, image_size=112, metadata=metadata)
    assert (large.size, large.resize) == (112, 128)
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert large.normalise(pixels).flatten().tolist() == pytest.approx([0.9, 0.4, 0.175])
