"""Detection scenes composed of labelled images, as a COCO-format folder.

Objects are cut from a data set's *test* images (never from those used in pretraining), scaled, tinted and
laid over procedural textures, later ones hiding parts of earlier ones; masks are what is visible, to the
pixel. The train and the test scenes share no source image. The same arguments give the same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pycocotools.mask as mask_codec
from PIL import Image
from scipy import ndimage

from pretrain.common.cli import settings_as_dict
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.output_folder import need_space, output_folder
from pretrain.common.output_folder import visible as names_in
from pretrain.common.progress import Progress
from pretrain.data.datasets import ImageDataset, open_dataset
from transfer.options.commands import ScenesSettings, parse

VERSION = 1  # of the recipe below: a folder composed by another one is made anew
MARKER = "scenes.json"
MOST_OBJECTS = 6
OBJECT_SIDE = (0.22, 0.55)  # of the scene's side
LEAST_VISIBLE = 0.4  # of an object's silhouette; a later object that would hide more is put elsewhere
LEAST_PIXELS = 24
BYTES_A_PIXEL = 0.6  # of a scene and its annotations, at most
PLACES_TRIED = 12


def compose(
    data_dir: str | Path,
    output: str | Path,
    *,
    train: int = 400,
    test: int = 100,
    size: int = 128,
    seed: int = 0,
    source: Literal["fashion_mnist", "cifar10", "imagefolder"] = "fashion_mnist",
) -> Path:
    """Write `train` + `test` scenes of `size` x `size` pixels under `output` and return it.

    `output`/scenes.json says what the folder was made from and whether it is complete; a folder cut off, or
    made with other settings, is made anew. Raises UserError where `output` holds something else.
    """
    settings = ScenesSettings(
        data_dir=Path(data_dir), output=Path(output), source=source,
        train=train, test=test, size=size, seed=seed,
    )  # fmt: skip
    dataset = open_dataset(source, data_dir, "test")
    made_from = {
        **{k: v for k, v in settings_as_dict(settings).items() if k not in ("data_dir", "output")},
        "fingerprint": dataset.fingerprint,
        "version": VERSION,
    }
    folder = settings.output
    if _is_there(folder, made_from):
        return folder
    write_json(folder / MARKER, {"complete": False, **made_from})
    pools = _disjoint_pools(len(dataset), train, test, seed)
    with Progress(train + test, label="scenes", unit="scene", file=folder / "progress.json") as progress:
        for split, count in (("train", train), ("test", test)):
            annotations = _write_split(folder / split, dataset, pools[split], count, settings, progress)
            write_json(folder / f"{split}.json", annotations)
    write_json(folder / MARKER, {"complete": True, **made_from})
    return folder


def _is_there(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` holds these very scenes; clears what an earlier composition left otherwise."""
    if not folder.exists() or not names_in(folder):
        return False
    marker = folder / MARKER
    if not marker.exists():
        raise UserError(f"{folder}: holds other files; give --output a new or an empty folder")
    try:
        if json.loads(marker.read_text()) == {"complete": True, **made_from}:
            return True
    except json.JSONDecodeError:
        pass
    for split in ("train", "test"):
        shutil.rmtree(folder / split, ignore_errors=True)
        (folder / f"{split}.json").unlink(missing_ok=True)
    return False


def _disjoint_pools(available: int, train: int, test: int, seed: int) -> dict[str, np.ndarray]:
    """Source indices of the two splits, in proportion to their scenes, none in both."""
    order = np.random.default_rng((seed, 0)).permutation(available)
    if min(train, test) == 0:
        cut = available if train else 0
    else:
        cut = int(np.clip(round(available * train / (train + test)), 1, available - 1))
    return {"train": order[:cut], "test": order[cut:]}


def _write_split(
    folder: Path, dataset: ImageDataset, pool: np.ndarray, count: int, settings: ScenesSettings,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Draw and save the scenes of one split; their COCO annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    sources = _endless(pool, settings.seed)
    split_number = 1 if folder.name == "train" else 2
    for number in range(1, count + 1):
        rng = np.random.default_rng((settings.seed, split_number, number))
        pixels, objects = draw_scene(dataset, sources, settings.size, rng, cut_out=settings.source)
        name = f"{number:05d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95)
        images.append({"id": number, "file_name": name, "width": settings.size, "height": settings.size})
        for label, visible in objects:
            rle = mask_codec.encode(np.asfortranarray(visible.astype(np.uint8)))
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0,
                "bbox": [float(v) for v in mask_codec.toBbox(rle)], "area": float(mask_codec.area(rle)),
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            })  # fmt: skip
        progress.update(1)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(dataset.classes)]
    info = {"description": f"scenes composed from {dataset.name} {dataset.split} images"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _endless(pool: np.ndarray, seed: int) -> Iterator[int]:
    """The pool's indices, each once, then again in another order, and so on."""
    rng = np.random.default_rng((seed, 3))
    while True:
        yield from (int(i) for i in pool)
        pool = rng.permutation(pool)


def draw_scene(
    dataset: ImageDataset, sources: Iterator[int], size: int, rng: np.random.Generator, *, cut_out: str
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One scene: pixels (size x size x 3, uint8), and its objects as (label, visible mask size x size)."""
    canvas = texture(size, rng)
    objects: list[tuple[int, np.ndarray]] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        source = next(sources)
        side = round(size * np.exp(rng.uniform(*np.log(OBJECT_SIDE))))
        shade, alpha = _cut_out(
            np.asarray(dataset.image(source)), side, silhouette=cut_out == "fashion_mnist"
        )
        if cut_out == "fashion_mnist":
            shade = shade * rng.uniform(0.75, 1.0, 3)
            if rng.random() < 0.5:
                shade, alpha = shade[:, ::-1], alpha[:, ::-1]
        silhouette = alpha >= 0.5
        for _ in range(PLACES_TRIED):
            top, left = rng.integers(0, size - side + 1, 2)
            window = np.s_[top : top + side, left : left + side]
            covered = np.zeros((size, size), bool)
            covered[window] = silhouette
            still = [int((mask & ~covered).sum()) for _, mask in objects]
            if covered.sum() >= LEAST_PIXELS and all(
                s >= max(LEAST_PIXELS, LEAST_VISIBLE * a) for s, a in zip(still, full_areas)
            ):
                objects = [(label, mask & ~covered) for label, mask in objects]
                objects.append((int(dataset.labels_N[source]), covered))
                full_areas.append(int(covered.sum()))
                canvas[window] += (shade - canvas[window]) * alpha[..., None]
                break
    return np.clip(canvas + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8), objects


def _cut_out(pixels: np.ndarray, side: int, *, silhouette: bool) -> tuple[np.ndarray, np.ndarray]:
    """An object of `side` x `side` pixels: its colours (float, 0 to 255) and its opacity (0 to 1)."""
    colours = np.clip(
        cv2.resize(pixels.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC), 0, 255
    )
    if not silhouette:
        return colours, np.ones((side, side), np.float32)
    body = ndimage.binary_fill_holes(pixels.max(axis=2) > 0)
    parts, found = ndimage.label(body, structure=np.ones((3, 3)))
    if found > 1:  # specks beside the garment
        sizes = np.bincount(parts.ravel())[1:]
        body = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))
    alpha = cv2.resize(body.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    return colours, np.clip(alpha * 2 - 0.5, 0, 1)


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """A background, size x size x 3, float32 of 0 to 255: noise of several scales, stripes or a gradient
    between two colours, with a little noise of each pixel."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.integers(0, 4)
    if kind == 0:
        blend = along - along.min()
    elif kind == 1:
        blend = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(2, 12) * along + rng.random()))
    else:
        cells = (2, 4, 8, 16, 32) if kind == 2 else (16, 32)
        blend = np.zeros((size, size), np.float32)
        for cell in cells:
            field = rng.random((cell, cell)).astype(np.float32)
            blend += cv2.resize(field, (size, size), interpolation=cv2.INTER_CUBIC) / cell**0.5
        blend -= blend.min()
    blend = (blend / max(float(blend.max()), 1e-6))[..., None]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    return (first + (second - first) * blend + rng.normal(0, 6, (size, size, 3))).astype(np.float32)


def main(argv: list[str]) -> int | None:
    """`python -m transfer scenes`."""
    settings: ScenesSettings = parse("scenes", argv)
    with output_folder(settings.output, "transfer scenes", earlier=lambda f: (f / MARKER).exists()) as folder:
        scenes = settings.train + settings.test
        need_space(folder, int(BYTES_A_PIXEL * scenes * settings.size**2), f"{scenes} scenes")
        compose(**{k: getattr(settings, k) for k in settings.__dataclass_fields__})
    print(f"{folder}: {settings.train} scenes to train on, {settings.test} to test on")
    return None
