"""INTL in a training loop of your own: any encoder, one process or several under torchrun.

python docs/examples/intl_in_your_loop.py --images FOLDER --output encoder.pt
torchrun --standalone --nproc-per-node 8 docs/examples/intl_in_your_loop.py ... (the same options)

FOLDER has a folder of images for each class, as torchvision's ImageFolder reads it; labels are not used.
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pretrain import diagnose, intl_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256, help="images a step, over all processes")
    parser.add_argument("--epochs", type=int, default=100)
    asked = parser.parse_args()

    world = int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if gpu else "gloo")

    torch.manual_seed(0)  # the same first weights on every rank
    backbone = timm.create_model(asked.arch, num_classes=0)
    encoder = nn.Sequential(backbone, nn.Linear(backbone.num_features, asked.features)).to(device)
    model = DistributedDataParallel(encoder) if world > 1 else encoder
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.05)

    view = v2.Compose([
        v2.ToImage(), v2.RandomResizedCrop(asked.size, (0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    images = ImageFolder(asked.images, transform=lambda image: (view(image), view(image)))
    sampler = DistributedSampler(images, drop_last=True) if world > 1 else None
    loader = DataLoader(
        images, batch_size=asked.batch // world, sampler=sampler, shuffle=sampler is None, drop_last=True
    )
    for epoch in range(asked.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for (first, second), _ in loader:
            embeddings = model(torch.cat([first, second]).to(device)).chunk(2)
            # The whitening runs over the joined batch of all ranks, and DDP's mean of the gradients is
            # exactly the gradient of that joined loss: nothing else is needed here.
            loss = intl_loss(embeddings)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        spectrum = diagnose(embeddings[0].detach())
        print(f"epoch {epoch + 1}: loss {loss.total.item():.4f}, RankMe {spectrum['rankme']:.1f}", flush=True)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(backbone.state_dict(), asked.output)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
