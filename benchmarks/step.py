"""One whole INTL training step: ours beside the published loop written plainly."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import Comparison, Step, Table, interleave, peak_extra_bytes
from benchmarks.loss import plain_loss
from pretrain.common.process_group import local_device
from pretrain.learner import Learner, choose_dtype
from pretrain.network.model import Encoder, build_backbone, build_projector, target_encoder_of
from pretrain.objectives.intl import intl_loss
from pretrain.optim import build_optimizer
from pretrain.training_step import TrainingStep

TITLE = "One INTL step with a momentum encoder: forward, loss, backward, optimizer, average"
LR, MOMENTUM, EMA = 0.002, 0.9, 0.99
STEPS = 20  # of an agreement
EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
"""The largest relative difference of the losses at any step, where both compute in the same precision."""
MIXED = 0.02
"""The one at the last step, where the two round differently."""


def build(arch: str, *, hidden: int, output: int) -> Encoder:
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    projector = build_projector(backbone.num_features, hidden=hidden, output=output, layers=3)
    return Encoder(backbone, projector)


def make_views(batch: int, side: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(batch, 3, side, side, generator=generator)
    return [(base + 0.3 * torch.rand(base.shape, generator=generator)).to(device) for _ in range(2)]


def plain_step(encoder: Encoder, views: list[Tensor], dtype: torch.dtype) -> Step:
    """The published loop: NCHW, autocast and with float16 a scaler, an average parameter by parameter."""
    device = views[0].device
    encoder = copy.deepcopy(encoder).to(device)
    average = copy.deepcopy(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), LR, momentum=MOMENTUM, foreach=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> float:
        with torch.no_grad():
            for fast_p, slow_p in zip(encoder.parameters(), average.parameters()):
                slow_p.data = slow_p.data * EMA + fast_p.data * (1 - EMA)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4):
            target = average.projector(average.backbone(views[0])).detach()
            other = encoder.projector(encoder.backbone(views[1]))
        loss = plain_loss([z.float() if z.dtype.itemsize < 4 else z for z in (target, other)])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def our_step(encoder: Encoder, views: list[Tensor], dtype: torch.dtype, how: str = "") -> Step:
    """As `pretrain.train` does it; `how` as --step, on a GPU a graph unless given."""
    device = views[0].device
    encoder = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(encoder, momentum=MOMENTUM, weight_decay=0.0)
    learner = Learner(encoder, target_encoder_of(encoder), optimizer, device, dtype)
    views = [v.contiguous(memory_format=torch.channels_last) for v in views]
    # The plain loss penalises both views; the target's term is a constant to the gradient.
    take = TrainingStep(
        learner, lambda batch: batch, lambda embeddings, _: intl_loss(embeddings),
        how or ("graph" if device.type == "cuda" else "eager"),
    )  # fmt: skip
    return lambda: take(views, 0, LR, EMA).loss.total.detach().clone()


def published_dtype(device: torch.device) -> torch.dtype:
    """What the published loop computes in."""
    return torch.float16 if device.type == "cuda" else torch.float32


Case = tuple[str, int, int, int]
"""Architecture, px a side, images, width of the projector."""


def cases(quick: bool) -> list[Case]:
    """A GPU: ResNet-50, 2 x 224, batch 256, as published. A CPU: ResNet-18, 2 x 48, that batch and its half.

    At smaller ones BN magnifies float32's rounding within 20 steps beyond any use (6e-4 at 64 images).
    """
    if quick:
        return [("resnet18", 32, 32, 128)]
    if torch.cuda.is_available():
        return [("resnet50", 224, 256, 8192)]
    return [("resnet18", 48, batch, 1024) for batch in (128, 256)]


def plain_case(arch: str, side: int, batch: int, width: int) -> Step:
    """The published step of a case."""
    device = local_device()
    encoder, views = build(arch, hidden=width, output=width), make_views(batch, side, device)
    return plain_step(encoder, views, published_dtype(device))


def our_case(arch: str, side: int, batch: int, width: int) -> Step:
    """Our step of a case."""
    device = local_device()
    encoder, views = build(arch, hidden=width, output=width), make_views(batch, side, device)
    how = "compiled_graph" if device.type == "cuda" else "eager"
    return our_step(encoder, views, choose_dtype("auto", device), how)


def warm_up() -> Step:
    """Libraries loaded, threads started."""
    return our_case("resnet18", 32, 16, 32)


def measure(quick: bool) -> list[Comparison]:
    """Times in turns; memory that the first step takes, momentum's included, beyond weights and views."""
    device = local_device()
    comparisons = []
    for case in cases(quick):
        times = interleave({"plain": plain_case(*case), "ours": our_case(*case)}, repeats=2 if quick else 7)
        comparisons.append(
            Comparison(
                case=f"{_name(case)}, {device.type}", reference=times["plain"], ours=times["ours"],
                reference_peak_bytes=peak_extra_bytes(plain_case, *case, warm_up=warm_up),
                ours_peak_bytes=peak_extra_bytes(our_case, *case, warm_up=warm_up),
                target_speedup=None if quick else 2.0 if device.type == "cuda" else 1.2,
                note=f"{_word(choose_dtype('auto', device))} beside {_word(published_dtype(device))}"
                + ("" if device.type == "cuda" else "; the GPU's part was not measured"),
            )
        )  # fmt: skip
    return comparisons


def _name(case: Case) -> str:
    return f"{case[0]}, {case[1]} px, batch {case[2]}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tables(quick: bool) -> list[Table]:
    """Whether the losses of both are equal, step by step."""
    device = local_device()
    rows: list[list[str | float]] = []
    for arch, side, batch, width in cases(quick):
        encoder = build(arch, hidden=width, output=width)
        pairs = [(torch.float64, torch.float64), (torch.float32, torch.float32)]
        mixed = (published_dtype(device), choose_dtype("auto", device))
        for reference, dtype in [*pairs, *([mixed] if mixed not in pairs else [])]:
            # A GPU computes float64 slowly, and what is to be shown shows with fewer images.
            images = min(batch, 32) if dtype == torch.float64 and device.type == "cuda" else batch
            views = make_views(images, side, device)
            differences = agreement(encoder, views, reference, dtype, steps=3 if quick else STEPS)
            rows.append(row(_name((arch, side, images, width)), reference, dtype, differences))
    return [
        Table(
            title=f"Agreement of the losses, {3 if quick else STEPS} steps, {device.type}",
            columns=("case", "reference, ours", "largest difference", "at the last step", "limit", "verdict"),
            rows=rows,
            missed=sum(r[-1] != "met" for r in rows),
            note="Relative differences. In float64 only the order of operations differs; in float32 the same "
            "rounding grows from step to step through BN, the faster the smaller the batch.",
        )
    ]


def agreement(
    encoder: Encoder, views: list[Tensor], reference: torch.dtype, dtype: torch.dtype, *, steps: int
) -> list[float]:
    """The losses' relative difference at each of some steps."""
    if dtype == torch.float64:
        encoder, views = copy.deepcopy(encoder).double(), [v.double() for v in views]
    # A GPU's convolutions of float32 would be TF32's, which has 10 bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype.itemsize < 4):
        how = "eager" if dtype == torch.float64 else ""  # a graph has its learning rate in float32
        plain, ours = plain_step(encoder, views, reference), our_step(encoder, views, dtype, how)
        pairs = [(float(plain()), float(ours())) for _ in range(steps)]  # type: ignore[arg-type]
    return [abs(a - b) / abs(a) for a, b in pairs]


def row(
    case: str, reference: torch.dtype, dtype: torch.dtype, differences: Sequence[float]
) -> list[str | float]:
    """A line of the table; a difference that is no number meets nothing."""
    exact = reference == dtype and dtype in EXACT
    limit = EXACT[dtype] if exact else MIXED
    judged = differences if exact else differences[-1:]
    return [
        case, f"{_word(reference)}, {_word(dtype)}", max(differences), differences[-1],
        f"{limit:g} {'at every step' if exact else 'at the last'}",
        "met" if all(d <= limit for d in judged) else "MISSED",
    ]  # fmt: skip
