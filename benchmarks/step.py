"""One whole INTL training step: ours beside the published loop written plainly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.harness import Comparison, Step, interleave
from benchmarks.loss import plain_loss
from pretrain.loss import intl_loss
from pretrain.model import Encoder, build_backbone, build_projector, momentum_copy, momentum_update
from pretrain.optim import build_optimizer
from pretrain.train import choose_dtype

TITLE = "One INTL step with a momentum encoder: forward, loss, backward, optimizer, average"
LR, MOMENTUM, EMA = 0.002, 0.9, 0.99


def build(arch: str, *, hidden: int, output: int) -> Encoder:
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    projector = build_projector(backbone.num_features, hidden=hidden, output=output, layers=3)
    return Encoder(backbone, projector)


def make_views(batch: int, side: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(batch, 3, side, side, generator=generator)
    return [(base + 0.3 * torch.rand(base.shape, generator=generator)).to(device) for _ in range(2)]


def plain_step(encoder: Encoder, views: list[Tensor]) -> Step:
    """The published loop: NCHW, float16 autocast and scaler on a GPU, an average parameter by parameter."""
    device = views[0].device
    encoder = copy.deepcopy(encoder).to(device)
    slow = copy.deepcopy(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), LR, momentum=MOMENTUM, foreach=False)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step() -> float:
        with torch.no_grad():
            for fast_p, slow_p in zip(encoder.parameters(), slow.parameters()):
                slow_p.data = slow_p.data * EMA + fast_p.data * (1 - EMA)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=on_gpu):
            target = slow.projector(slow.backbone(views[0])).detach()
            other = encoder.projector(encoder.backbone(views[1]))
        loss = plain_loss([z.float() if z.dtype.itemsize < 4 else z for z in (target, other)])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def our_step(encoder: Encoder, views: list[Tensor], dtype: torch.dtype) -> Step:
    """As `pretrain.train` does it."""
    device = views[0].device
    encoder = copy.deepcopy(encoder).to(device)
    encoder.to(memory_format=torch.channels_last)
    slow = momentum_copy(encoder)
    views = [v.contiguous(memory_format=torch.channels_last) for v in views]
    optimizer = build_optimizer(encoder, name="sgd", momentum=MOMENTUM, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = LR

    def step() -> Tensor:
        momentum_update(slow, encoder, EMA)
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4):
            with torch.no_grad():
                target = slow(views[:1])
            embeddings = target + encoder(views[1:])
        # The plain loss penalises both views; the target's term is a constant to the gradient.
        loss = intl_loss(embeddings).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def agreement(encoder: Encoder, views: list[Tensor], dtype: torch.dtype, steps: int) -> float:
    """Largest relative difference of the two losses over some steps. float64 shows that they compute the
    same: in float32 rounding grows from step to step, the faster the smaller the batch that BN sees."""
    if dtype == torch.float64:
        encoder, views = copy.deepcopy(encoder).double(), [v.double() for v in views]
    plain, ours = plain_step(encoder, views), our_step(encoder, views, dtype)
    pairs = [(float(plain()), float(ours())) for _ in range(steps)]  # type: ignore[arg-type]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def measure(quick: bool) -> list[Comparison]:
    """A GPU: ResNet-50, 2 x 224, batch 256. A CPU: ResNet-18, 2 x 48, batch 64 to 256."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = choose_dtype("auto", device)
    cases = [("resnet50", 224, 256, 8192)] if gpu else [("resnet18", 48, b, 1024) for b in (64, 128, 256)]
    if quick:
        cases = [("resnet18", 32, 32, 128)]
    comparisons = []
    for arch, side, batch, width in cases:
        encoder, views = build(arch, hidden=width, output=width), make_views(batch, side, device)
        exact = (
            agreement(encoder, views, torch.float32, steps=3 if quick else 20) if not gpu else float("nan")
        )
        mixed = agreement(encoder, views, dtype, steps=3 if quick else 20)
        note = f"losses differ by at most {exact:.1e} in float32, {mixed:.1e} in {dtype}"
        if not gpu:
            same = agreement(encoder, views, torch.float64, steps=3 if quick else 20)
            note += f", {same:.1e} in float64; the GPU's part was not measured"
        steps = {"plain": plain_step(encoder, views), "ours": our_step(encoder, views, dtype)}
        times = interleave(steps, repeats=2 if quick else 7)
        comparisons.append(
            Comparison(
                case=f"{arch}, {side} px, batch {batch}, {device.type}", reference=times["plain"],
                ours=times["ours"], target_speedup=None if quick else 2.0 if gpu else 1.2,
                note=note,
            )
        )  # fmt: skip
    return comparisons
