"""`transfer spectrum-study`: which transformations and objectives avoid collapse on a small data set.

`python -m transfer spectrum-study` trains one small timm ResNet for each of them and each seed: with 2 − 2
cos between the transformed embeddings of two views, INTL with its penalty besides, or with another
objective; runs of a seed start from the same weights and see the same batches. Beside them a control that
is not trained, and the pixels. It asks what Section 3 of Weng et al. (ICLR 2024,
https://arxiv.org/abs/2305.16789) asks, at a size for two cores.

OUTPUT/runs.jsonl (one finished run a line, so that a stopped study goes on), study.md and three SVG pictures.
Letters of shapes: N images of a batch, D features.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.common.cli import save_settings, settings_as_dict
from pretrain.common.errors import UserError
from pretrain.common.files import append_jsonl, read_jsonl
from pretrain.common.output_folder import output_folder
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.network.model import Encoder, build_projector
from pretrain.network.small_maps import multiply_small_maps
from pretrain.objectives.diagnostics import collapse, diagnose
from pretrain.objectives.expression import expression
from pretrain.objectives.gaussian import sigreg_loss
from pretrain.objectives.intl import intl_loss, loss_floor
from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
from pretrain.objectives.spectral import (
    IterNorm,
    SpectralFunction,
    Whitening,
    covariance,
    iternorm,
    power,
    spectral_transform,
    zca,
)
from pretrain.objectives.views import ObjectiveLoss
from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
from pretrain.objectives.whitening import spectral_loss, w_mse_loss
from pretrain.optim import build_optimizer
from pretrain.schedules import lr_at
from pretrain.settings import TITLES
from pretrain.views.augment import View
from pretrain.views.loader import StepBatches, Views, batches, epoch_order
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.options.commands import StudySettings, parse
from transfer.spectrum.rank_metrics import rank_metrics
from transfer.spectrum.study_pictures import write_study
from transfer.spectrum.view_metrics import uniformity

logger = logging.getLogger(__name__)

SIZE = 32  # pixels a side
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One way to train: its name, what it does to the eigenvalues, and its loss."""

    name: str
    kind: Literal["power", "hard", "transform", "iternorm", "intl", "objective", "control", "pixels"]
    features: int
    """Length of the embeddings."""
    g: SpectralFunction | None = None
    objective: Callable[..., ObjectiveLoss] | None = None

    def loss(self, views: list[Tensor], whitening: Whitening, step: int) -> Tensor:
        """The scalar loss of V views N x D. Raises ValueError where a covariance is not finite."""
        if self.objective is not None:
            own: dict[str, int] = {}
            if self.objective is sigreg_loss:
                own = {"step": step}
            elif self.objective is w_mse_loss:
                own = {"sub_batch": len(views[0])}
            return self.objective(views, **own).total
        assert self.g is not None
        if isinstance(self.g, IterNorm):
            trade_off = None if self.kind == "intl" else 0.0
            return intl_loss(
                views, iterations=self.g.iterations, trade_off=trade_off, whitening=whitening
            ).total
        return spectral_loss(views, self.g, whitening=whitening)

    def floor(self, settings: StudySettings) -> float | None:
        """What the loss cannot fall under; None where no such number is known."""
        if self.kind == "intl":
            return loss_floor(settings.batch, self.features, iterations=4, whitening=settings.whitening)
        return None if self.kind in ("objective", "pixels") else 0.0


OBJECTIVES: dict[str, Callable[..., ObjectiveLoss]] = {
    "vicreg": vicreg_loss, "barlow_twins": barlow_twins_loss, "w_mse": w_mse_loss, "frossl": frossl_loss,
    "mmcr": mmcr_loss, "coding_rate": coding_rate_loss, "sigreg": sigreg_loss,
}  # fmt: skip


def instances(settings: StudySettings) -> list[Instance]:
    """The grid: powers in order, hard whitening, other transformations, IterNorm by T, INTL, objectives,
    controls.

    W-MSE whitens more images than features at a time: it gets half as many features as a batch has images.
    """
    d = settings.features
    powers = [
        Instance(name=f"λ^-{p:g}" if p else "none", kind="power", g=power(p), features=d)
        for p in settings.powers if p != 0.5
    ]  # fmt: skip
    hard = Instance(name="hard whitening", kind="hard", g=zca(), features=d)
    others = [
        Instance(name=text, kind="transform", g=expression(text), features=d) for text in settings.transforms
    ]
    newton = [
        Instance(name=f"IterNorm T={t}", kind="iternorm", g=iternorm(t), features=d)
        for t in settings.iterations
    ]
    intl = Instance(name="INTL", kind="intl", g=iternorm(4), features=d)
    objectives = [
        Instance(
            name=TITLES[name], kind="objective", objective=OBJECTIVES[name],
            features=min(d, settings.batch // 2) if name == "w_mse" else d,
        )
        for name in settings.objectives
    ]  # fmt: skip
    controls = [
        Instance(name="random control", kind="control", g=power(0.0), features=d),
        Instance(name="raw pixels", kind="pixels", features=d),
    ]
    return [*powers, hard, *others, *newton, intl, *objectives, *controls]


WRITES = ("config.yaml", "progress.json", "runs.jsonl", "study.md", "spectra.svg", "curves.svg", "knn.svg")


def main(argv: list[str]) -> int | None:
    """`python -m transfer spectrum-study`."""
    settings: StudySettings = parse("spectrum-study", argv)
    with output_folder(settings.output, "transfer spectrum-study", writes=WRITES, earlier=StudySettings):
        study(settings)
    return None


def study(settings: StudySettings) -> Path:
    """Do the runs that OUTPUT does not hold yet, then write study.md and the pictures; returns study.md."""
    output = Path(settings.output)
    train = open_dataset(settings.dataset, settings.data_dir, "train")
    test = open_dataset(settings.dataset, settings.data_dir, "test")
    if len(train) < settings.batch:
        raise UserError(f"--batch {settings.batch} is more than the {len(train)} training images there are")
    same = {k: v for k, v in settings_as_dict(settings).items() if k not in ("output", "data_dir", "seeds")}
    # A larger grid adds runs to those that are there. Earlier versions had spectra in float32, and blocks
    # that begin as 1x1 convolutions: untrained they saw one corner of an image.
    same |= dict.fromkeys(("powers", "iterations", "transforms", "objectives"))
    same |= {"spectra": "float64", "zero_init_last": False}
    done = read_jsonl(output / "runs.jsonl")
    if any(run["settings"] != same for run in done):
        raise UserError(f"{output} holds runs of other settings or an earlier version: take another --output")
    save_settings(settings, output / "config.yaml")
    bank = _pixels(train, settings.bank, seed=0)
    queries = _pixels(test, settings.queries, seed=0)
    finished = {(run["instance"], run["seed"]) for run in done}
    wanted = [(i, seed) for seed in range(settings.seeds) for i in instances(settings)]
    missing = [(i, seed) for i, seed in wanted if (i.name, seed) not in finished]
    progress = Progress(
        len(wanted) * settings.steps, label="spectrum study",
        start=(len(wanted) - len(missing)) * settings.steps, file=output / "progress.json",
    )  # fmt: skip
    with StopSignals() as stop, progress as bar:
        for instance, seed in missing:

            def on_step(loss: float, instance: Instance = instance, seed: int = seed) -> None:
                bar.update(1, run=f"{instance.name} seed {seed}", loss=loss)
                if stop.requested:  # this run is done again: finished ones are kept
                    stop.hand_over()

            if instance.kind == "pixels":
                run = _pixels_run(settings, instance, seed, bank, queries, on_step)
            else:
                run = _run(settings, instance, seed, train, bank, queries, on_step)
            append_jsonl(output / "runs.jsonl", {**run, "settings": same})
    features = {i.name: i.features for i in instances(settings)}
    names = [*features]
    runs = [
        {**r, "possible_rank": possible_rank(settings, features[r["instance"]])}
        for r in read_jsonl(output / "runs.jsonl")
        if r["instance"] in names and r["seed"] < settings.seeds
    ]
    runs.sort(key=lambda r: (names.index(r["instance"]), r["seed"]))
    path = write_study(runs, output, title=f"{settings.dataset}, {settings.whitening} whitening")
    print(path.read_text())
    return path


def _run(
    settings: StudySettings,
    instance: Instance,
    seed: int,
    train: ImageDataset,
    bank: tuple[Tensor, np.ndarray],
    queries: tuple[Tensor, np.ndarray],
    on_step: Callable[[float], None],
) -> dict[str, Any]:
    """Train one encoder and evaluate it; one line of runs.jsonl."""
    began = time.monotonic()
    torch.manual_seed(seed)
    encoder = _encoder(instance.features)
    optimizer = build_optimizer(encoder, momentum=0.9, weight_decay=1e-4)
    view = View(
        size=SIZE, min_scale=0.3, interpolation="bilinear", jitter=(0.4, 0.4, 0.2, 0.1), grey_p=0.1,
        blur_p=0.0, solarise_p=0.0,
    )  # fmt: skip
    views = Views(train, [view, view], seed=seed, mean=MEAN, std=STD, finish_here=True)
    order = StepBatches(
        len(train), batch_global=settings.batch, rank=0, world=1, seed=seed, start=0, stop=settings.steps
    )
    every = max(1, settings.steps // 12)
    log: list[dict[str, Any]] = []
    failure = None
    for step, batch in enumerate(batches(views, order, workers=0)):
        for group in optimizer.param_groups:
            lr = lr_at(step, base=settings.lr, warmup=settings.steps // 10, total=settings.steps)
            group["lr"] = 0.0 if instance.kind == "control" else lr  # whose BatchNorm statistics settle
        embeddings = encoder(batch.views)
        try:
            loss = instance.loss(embeddings, settings.whitening, step)
        except ValueError as error:  # the covariance is not finite
            failure = f"step {step + 1}: {error}"
            break
        if not math.isfinite(float(loss.detach())):
            failure = f"step {step + 1}: loss {float(loss.detach())}"
            break
        if step % every == 0 or step + 1 == settings.steps:
            log.append(
                {
                    "step": step + 1,
                    "loss": float(loss.detach()),
                    **_spectra(embeddings[1], instance, settings),
                }
            )
        optimizer.zero_grad()
        loss.backward()
        if instance.kind == "objective":  # their weights differ by orders of magnitude, up to 200
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        on_step(float(loss.detach()))
    verdict = failure
    if verdict is None:  # a run that diverged may have nothing logged
        last = {key: value for key, value in log[-1].items() if isinstance(value, float)}
        verdict = collapse(last, n=settings.batch, d=instance.features)
    top1, spectrum = (None, {}) if failure else _judged(encoder.backbone, bank, queries)
    return {
        "instance": instance.name, "kind": instance.kind, "seed": seed, "log": log, "diverged": failure,
        "verdict": verdict, "knn_top1": top1, "spectrum": spectrum, "floor": instance.floor(settings),
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def _pixels_run(
    settings: StudySettings, instance: Instance, seed: int, bank: tuple[Tensor, np.ndarray],
    queries: tuple[Tensor, np.ndarray], on_step: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """The pixels in place of features, which no seed changes; the steps it does not take are told as done."""
    began = time.monotonic()
    top1, spectrum = _judged(nn.Flatten(), bank, queries)
    for _ in range(settings.steps):
        on_step(0.0)
    return {
        "instance": instance.name, "kind": instance.kind, "seed": seed, "log": [], "diverged": None,
        "verdict": None, "knn_top1": top1, "spectrum": spectrum, "floor": None,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def possible_rank(settings: StudySettings, features: int) -> int:
    """How many eigenvalues of the covariance can be positive: centring takes one from the averaged side."""
    if settings.whitening == "channel":
        return min(settings.batch, features - 1)
    return min(features, settings.batch - 1)


def _encoder(features: int) -> Encoder:
    """A ResNet of four narrow blocks: some 10 MFLOP an image of 32 x 32, so that the study fits two cores."""
    from timm.models.resnet import BasicBlock, ResNet

    backbone = ResNet(
        BasicBlock,  # type: ignore[arg-type]
        (1, 1, 1, 1),
        num_classes=0,
        channels=(32, 64, 128, 256),
        stem_width=32,
        zero_init_last=False,  # as of ResNet-18 in pretraining
    )
    projector = build_projector(backbone.num_features, hidden=512, output=features, layers=3)
    encoder = multiply_small_maps(Encoder(backbone, projector))
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def _spectra(z_ND: Tensor, instance: Instance, settings: StudySettings) -> dict[str, Any]:
    """The diagnosis, and eigenvalues as shares of their sum before and after the transformation."""
    z = z_ND.detach().double()
    axis = -1 if settings.whitening == "channel" else 0
    before = covariance(z - z.mean(axis, keepdim=True), settings.whitening)
    found = {**diagnose(z), "eigenvalues": _shares(before)}
    if instance.g is not None:
        after = spectral_transform(z, instance.g, whitening=settings.whitening)
        spectrum = torch.linalg.eigvalsh(covariance(after, settings.whitening))
        found["transformed"] = spectrum.flip(0).tolist()
    return found


def _shares(s_MM: Tensor) -> list[float]:
    eigenvalues = torch.linalg.eigvalsh(s_MM).flip(0).clamp_min(0)
    return (eigenvalues / eigenvalues.sum().clamp_min(1e-300)).tolist()


def _pixels(images: ImageDataset, count: int, *, seed: int) -> tuple[Tensor, np.ndarray]:
    """`count` images of the set, scaled to 32 x 32 and normalised, and their labels."""
    chosen = epoch_order(len(images), seed, 0)[:count]
    pixels = np.stack([np.asarray(images.image(int(i)).resize((SIZE, SIZE))) for i in chosen])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std, images.labels_N[chosen]


@torch.no_grad()
def _judged(
    backbone: nn.Module, bank: tuple[Tensor, np.ndarray], queries: tuple[Tensor, np.ndarray]
) -> tuple[float | None, dict[str, float]]:
    """Top-1 percent of the weighted 20-NN classifier on backbone features, and their metrics of rank.

    Nothing where they are not finite.
    """
    backbone.eval()
    bank_ND, query_MD = (torch.cat([backbone(x) for x in xs.split(500)]) for xs in (bank[0], queries[0]))
    if not (torch.isfinite(bank_ND).all() and torch.isfinite(query_MD).all()):
        return None, {}
    k = min(20, len(bank_ND))
    top1 = knn_evaluate(bank_ND, bank[1], query_MD, queries[1], ks=[k])[f"top1_k{k}"]
    metrics = {**rank_metrics(bank_ND), "uniformity": uniformity(bank_ND)}
    return top1, {name: value for name, value in metrics.items() if math.isfinite(value)}
