"""Masks are read by class number, public sets found in their usual folders, bad masks refused."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import ExifTags, Image

from pretrain.common.errors import UserError
from tests.helpers.pixel_data import COLOURS, write_pixels
from transfer.detection import data
from transfer.detection.config import load_config
from transfer.detection.data import also_trained_on, categories
from transfer.detection.semantic.label_files import counts_of, read_labels
from transfer.detection.semantic.mapper import SemanticMapper
from transfer.detection.semantic.sets import _from_folders

TINY = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "8", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4"]


def checked(folder: Path, *words: str) -> list[str]:
    data.register([], [f"small_{s}={folder / 'images'}:{folder / 'masks'}" for s in ("train", "test")])
    return data.check(load_config("small_R18_FCN", [*TINY, *words]))


def test_a_palettes_numbers_are_the_labels(tmp_path: Path) -> None:
    write_pixels(tmp_path, 1)
    labels = read_labels(str(tmp_path / "masks" / "0.png"))
    assert set(np.unique(labels)) == {0, 1, 2, 3, 255} and labels.shape == (44, 52)
    for mode, value in (("1", True), ("I;16", 300)):
        Image.new(mode, (3, 2), value).save(tmp_path / "other.png")
        found = read_labels(str(tmp_path / "other.png"))
        assert found.tolist() == [[int(value)] * 3] * 2 and found.dtype in (np.uint8, np.int32)


def test_images_and_labels_are_changed_alike(tmp_path: Path) -> None:
    """The class is the colour, so every crop, flip and size must still show the one where the other is."""
    write_pixels(tmp_path, 3)
    checked(tmp_path)
    cfg = load_config("small_R18_FCN", [*TINY, "INPUT.COLOR_AUG_SSD", "False", "INPUT.CROP.SIZE", "(40,40)"])
    shapes = set()
    for train in (True, True, True, False):
        mapper = SemanticMapper(cfg, train=train)
        for record in DatasetCatalog.get("small_train"):
            found = mapper(record)
            assert (found["height"], found["width"]) == (44, 52) and ("sem_seg" in found) == train
            if train:
                shapes.add(tuple(found["sem_seg"].shape))
                assert found["image"].shape[1:] == found["sem_seg"].shape
                image = found["image"].permute(1, 2, 0).numpy().astype(int)
                nearest = np.abs(image[:, :, None] - COLOURS.astype(int)).sum(-1).argmin(-1)
                labels = found["sem_seg"].numpy()
                agree = (nearest == labels)[labels != 255].mean()
                assert agree > 0.8  # all but the blurred edges
            else:
                assert found["image"].shape == (3, 64, 76)  # 44 x 52 px to a short side of 64
    assert shapes == {(40, 40)}


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _turn(file: Path, way: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = way
    with Image.open(file) as image:
        image.load()
        image.save(file, exif=exif)


def test_images_turned_by_half_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pixels(tmp_path, 3)
    checked(tmp_path)
    assert "EXIF" not in caplog.text
    _turn(tmp_path / "images/1.jpg", 3)  # whether its mask is, no size shows
    checked(tmp_path)
    assert "1 of 3 images are turned by their EXIF orientation" in caplog.text


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: Image.open(f / "masks/1.png").convert("RGB").save(f / "masks/1.png"),
         r"1\.png is an image of colours \(RGB\); wanted class numbers"),
        (lambda f: Image.new("L", (52, 44), 7).save(f / "masks/1.png"),
         r"1 of 3 masks hold labels beyond 0 to 3 and the ignored 255: 7, first in .*1\.png; if its pixels "
         "are to be left out, add MODEL.SEM_SEG_HEAD.IGNORE_VALUE 7, "
         "else set MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        (lambda f: Image.new("L", (50, 44), 1).save(f / "masks/1.png"), r"1\.jpg is 52 x 44, .*50 x 44"),
        (lambda f: (f / "masks/1.png").unlink(), r"images/1\.jpg has no mask in .* as 1 of 3"),
        (lambda f: (f / "images/1.jpg").unlink(), r"masks/1\.png has no image in .* as 1 of 3"),
        (lambda f: [p.unlink() for p in (f / "masks").iterdir()], r"masks holds no masks \(\*\.png\)"),
        (lambda f: [Image.new("L", (52, 44), 255).save(p) for p in (f / "masks").iterdir()],
         "no pixel of its 3 masks is labelled"),
        (lambda f: (f / "masks/1.png").write_bytes(b"none"), r"1\.png is not a readable mask"),
        (lambda f: _as_pipe(f / "masks/1.png"), r"masks/1\.png is no file \(a pipe\)"),
        (lambda f: _as_pipe(f / "images/1.jpg"), r"images/1\.jpg is no file \(a pipe\)"),
        (lambda f: _turn(f / "masks/1.png", 3), r"masks/1\.png is turned by its EXIF orientation \(3\)"),
        (lambda f: _turn(f / "images/1.jpg", 6), r"1\.jpg is shown as 44 x 52 by its EXIF orientation, its"),
        (lambda f: (f / "images/1.jpg").write_bytes(b"none"), r"1\.jpg is not a readable image"),
    ],
)  # fmt: skip
def test_bad_masks_are_refused(tmp_path: Path, harm: Callable[[Path], object], said: str) -> None:
    write_pixels(tmp_path, 3)
    assert checked(tmp_path) == [
        f"small_{s}: 3 images, 4 of 4 classes in their masks" for s in ("train", "test")
    ]
    harm(tmp_path)
    with pytest.raises(UserError, match=said):
        checked(tmp_path)


def test_the_ignored_label_and_the_classes_must_be_the_configs(tmp_path: Path) -> None:
    write_pixels(tmp_path, 2)
    with pytest.raises(UserError, match=r"beyond 0 to 3 and the ignored 9: 255, .*IGNORE_VALUE 255"):
        checked(tmp_path, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "9")
    with pytest.raises(UserError, match="2 of 2 masks hold labels beyond 0 to 2 and the ignored 255: 3"):
        checked(tmp_path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3")
    assert checked(tmp_path) and categories("small_train")[3] == (3, "class 3")
    records = DatasetCatalog.get("small_train")
    assert also_trained_on("small_test", records, ())[0].startswith("100 % of the images of small_test")
    for words, said in (
        (["DATASETS.TEST", "('coco_2017_val',)"], "has no label mask for every image"),
        (["DATASETS.TEST", "('nowhere',)"], "give --sem-seg nowhere=IMAGES:MASKS"),
        (
            ["DATASETS.TEST", "('voc_2012_sem_seg_val',)"],
            "VOC2012/ImageSets/Segmentation/train.txt is missing",
        ),
    ):
        with pytest.raises(UserError, match=said):
            checked(tmp_path, *words)
    for wrong, said in (
        ("x", "wanted NAME=IMAGES:MASKS"),
        (f"a={tmp_path}:nowhere", "no such folder of masks"),
    ):
        with pytest.raises(UserError, match=said):
            data.register([], [wrong])


def test_public_sets_in_their_usual_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    source = write_pixels(tmp_path / "source", 6)
    voc, ade = tmp_path / "VOC2012", tmp_path / "ADEChallengeData2016"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (source / "images").rename(voc / "JPEGImages")
    (source / "masks").rename(voc / "SegmentationClass")
    for split, names in (("train", "0 1"), ("val", "2")):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text(names.replace(" ", "\n") + "\n")
    (voc / "SegmentationClassAug").mkdir()
    for name in "01235":  # SBD has labels for VOC's own images too: of those only the others are added
        labels = read_labels(str(voc / f"SegmentationClass/{name}.png"))
        Image.fromarray(labels).save(voc / f"SegmentationClassAug/{name}.png")
    names = {s: [Path(r["file_name"]).stem for r in DatasetCatalog.get(f"voc_2012_sem_seg_{s}")]
             for s in ("train", "val", "aug")}  # fmt: skip
    assert names == {"train": ["0", "1"], "val": ["2"], "aug": ["3", "5"]}
    words = ["DATASETS.TRAIN", "('voc_2012_sem_seg_train','voc_2012_sem_seg_aug')"]
    words += ["DATASETS.TEST", "('voc_2012_sem_seg_val',)"]
    lines = data.check(load_config("small_R18_FCN", words))  # of 21 classes
    assert lines[1] == "voc_2012_sem_seg_aug: 2 images, 4 of 21 classes in their masks"
    assert [n for _, n in categories("voc_2012_sem_seg_val")][::20] == ["background", "tvmonitor"]
    with pytest.raises(
        UserError, match=r"has 21 classes, the config 4: add MODEL.SEM_SEG_HEAD.NUM_CLASSES 21"
    ):
        data.check(load_config("small_R18_FCN", [*TINY, *words]))
    with pytest.raises(UserError, match="has 255 as the label to ignore, the config 254"):
        data.check(load_config("small_R18_FCN", [*words, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"]))

    with pytest.raises(
        UserError, match=r"annotations_detectron2/validation is missing.*prepare_ade20k_sem_seg"
    ):
        DatasetCatalog.get("ade20k_sem_seg_val")
    for split in ("training", "validation"):
        write_pixels(tmp_path / split, 2)
        for here, there in (("images", "images"), ("masks", "annotations_detectron2")):
            (ade / there).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / here).rename(ade / there / split)
    words = ["DATASETS.TRAIN", "('ade20k_sem_seg_train',)", "DATASETS.TEST", "('ade20k_sem_seg_val',)"]
    lines = data.check(load_config("small_R18_FCN", [*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "150"]))
    assert lines[0] == "ade20k_sem_seg_train: 2 images, 4 of 150 classes in their masks"


def test_cityscapes_by_detectron2s_own_loader(tmp_path: Path) -> None:
    source = write_pixels(tmp_path / "source", 1)
    for kind, file, name in (("leftImg8bit", "images/0.jpg", "leftImg8bit.png"),
                             ("gtFine", "masks/0.png", "gtFine_labelTrainIds.png")):  # fmt: skip
        (tmp_path / kind / "bonn").mkdir(parents=True)
        Image.open(source / file).save(tmp_path / kind / "bonn" / f"bonn_0_0_{name}")
    for name in ("labelIds.png", "instanceIds.png"):
        (tmp_path / f"gtFine/bonn/bonn_0_0_gtFine_{name}").touch()
    (tmp_path / "gtFine/bonn/bonn_0_0_gtFine_polygons.json").write_text(
        json.dumps({"imgHeight": 44, "imgWidth": 52})
    )
    from detectron2.data.datasets.cityscapes import load_cityscapes_semantic

    name = "cityscapes_fine_sem_seg_val"
    earlier = DatasetCatalog.pop(name)
    DatasetCatalog.register(
        name, lambda: load_cityscapes_semantic(str(tmp_path / "leftImg8bit"), str(tmp_path / "gtFine"))
    )
    try:
        words = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
        cfg = load_config("small_R18_FCN", [*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19"])
        assert data.check(cfg) == [f"{name}: 1 images, 4 of 19 classes in their masks"]
        assert [n for _, n in categories(name)][:2] == ["road", "sidewalk"]
        assert MetadataCatalog.get(name).ignore_label == 255
    finally:
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, earlier)


def test_one_file_is_not_image_and_mask(tmp_path: Path) -> None:
    """Images beside their masks in one folder, or the same folder twice: the network would see its labels."""
    for folder, names in (("both", ("0.jpg", "0.png")), ("masks", ("0.png",))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("L", (8, 8), 1).save(tmp_path / folder / name)
    for folder, said in (("both", "have one name: which is meant"), ("masks", "would be image and mask")):
        with pytest.raises(UserError, match=said):
            _from_folders(str(tmp_path / folder), str(tmp_path / folder))


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_refused(bits: int, tmp_path: Path) -> None:
    """Pillow reads a label 1 of 4 bits as 17."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0]) + bytes([0b00010001] * bits))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "m.png").write_bytes(png)
    for read in (read_labels, counts_of):
        with pytest.raises(UserError, match=f"holds {bits} bits a pixel of grey"):
            read(str(tmp_path / "m.png"))
