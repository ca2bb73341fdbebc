"""Train with IAM-D in a loop of Hugging Face's accelerate, in one process or several. Changed lines: (1) to (3).

pip install 'gm_probe[accelerate]'
torchrun --nproc-per-node 2 examples/accelerate_loop.py       # or: accelerate launch
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gm_probe.optim


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--save", help="where to write the weights at the end")
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = gm_probe.optim.IAMD(model, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)  # (1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:1792], dtype=torch.float32) / 16, torch.tensor(labels[:1792]))
    loader = DataLoader(data, 64 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(options.epochs):
        total = 0.0
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:  # (2) no backward
                logits = model(x)
                return functional.cross_entropy(logits, y), logits

            optimizer.zero_grad()
            loss = optimizer.optimizer.backward(closure)  # (3)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(accelerator.reduce(loss, "mean"))
        accelerator.print(
            f"epoch {epoch + 1}  loss {total / len(loader):.4f}  processes {accelerator.num_processes}"
        )
    if options.save and accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), options.save)
    accelerator.end_training()


if __name__ == "__main__":
    main()
