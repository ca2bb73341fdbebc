"""Fine-tune a torchvision classifier with IAM-D, in an ordinary PyTorch loop.

    python examples/finetune.py DATA --weights DEFAULT              # DATA/train/CLASS/*.jpg, DATA/val/CLASS/*.jpg
    torchrun --nproc-per-node 2 examples/finetune.py DATA           # each process takes its part of every batch
    gmprobe measure finetuned.pt --model torchvision:resnet18 --unlabeled DATA/val --image-size 224 \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225            # and how will it generalize?

What differs from the loop that you have is marked with (1) to (3). Optimizer, scheduler, autocast, GradScaler,
gradient clipping, torch.compile and torchrun are used as ever.
"""

from __future__ import annotations

import click
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

from gm_probe import IAMD
from gm_probe.runtime.processes import count, joined, rank


@click.command()
@click.argument("data")
@click.option("--model", "name", default="resnet18", show_default=True)
@click.option("--weights", help="DEFAULT, IMAGENET1K_V2, ... as torchvision names them.  [default: none]")
@click.option("--image-size", default=224, show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--batch-size", default=64, show_default=True, help="Over all processes.")
@click.option("--lr", default=0.01, show_default=True)
@click.option("--rho", default=0.1, show_default=True)
@click.option("--beta", default=1.0, show_default=True)
@click.option("--amp", type=click.Choice(["none", "bf16", "fp16"]), default="none", show_default=True)
@click.option("--compile", "compiled", is_flag=True)
@click.option("--out", default="finetuned.pt", show_default=True)
def main(
    data: str,
    name: str,
    weights: str | None,
    image_size: int,
    epochs: int,
    batch_size: int,
    lr: float,
    rho: float,
    beta: float,
    amp: str,
    compiled: bool,
    out: str,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with joined(device):
        tune, check = loaders(data, image_size, batch_size)
        model = torchvision.models.get_model(name, weights=weights)
        model.fc = nn.Linear(model.fc.in_features, len(tune.dataset.classes))  # type: ignore[attr-defined]
        model.to(device)
        net = torch.compile(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(tune))
        scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        half = torch.float16 if amp == "fp16" else torch.bfloat16
        rule = IAMD(net, nn.CrossEntropyLoss(label_smoothing=0.1), rho=rho, beta=beta)  # (1)
        for epoch in range(epochs):
            model.train()
            if isinstance(tune.sampler, DistributedSampler):
                tune.sampler.set_epoch(epoch)
            for x, y in tune:
                optimizer.zero_grad()
                with torch.autocast(device.type, half, enabled=amp != "none"):
                    seen = rule.backward(x.to(device), y.to(device), scaler=scaler)  # (2) for loss.backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
            if rank() == 0:
                # (3) seen.logits, seen.loss and seen.inconsistency are there for your logs
                print(
                    f"epoch {epoch + 1}  loss {seen.loss:.3f}  inconsistency {seen.inconsistency:.2g}  "
                    f"validation accuracy {accuracy(model, check, device):.3f}"
                )
        if rank() == 0:
            torch.save(model.state_dict(), out)


def loaders(data: str, size: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    normal = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augmented = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normal])
    plain = v2.Compose([v2.ToImage(), v2.Resize((size, size)), *normal])
    train = torchvision.datasets.ImageFolder(f"{data}/train", augmented)
    check = torchvision.datasets.ImageFolder(f"{data}/val", plain)
    sampler = DistributedSampler(train) if count() > 1 else None
    tune = DataLoader(train, batch_size // count(), shuffle=sampler is None, sampler=sampler, drop_last=True)
    return tune, DataLoader(check, batch_size)


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in batches)
    return right / len(batches.dataset)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
