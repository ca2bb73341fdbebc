"""Train with IAM-D in Lightning. Changed lines: (1) to (4).

pip install 'gm_probe[lightning]'
python examples/lightning_training.py --epochs 3
"""

from __future__ import annotations

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gm_probe.optim


class Classifier(lightning.LightningModule):
    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # (1)
        self.epochs = epochs
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def configure_optimizers(self) -> dict:
        optimizer = gm_probe.optim.IAMD(self.model, torch.optim.AdamW, lr=3e-3, rho=0.1)  # (2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
        }

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch

        def closure() -> tuple[Tensor, Tensor]:  # (3) it runs several times: no backward, no log
            logits = self.model(x)
            return functional.cross_entropy(logits, y), logits

        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer.step(closure)  # (4)
        self.log("loss", optimizer.optimizer.seen.loss, on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()
        print(f"epoch {self.current_epoch + 1}  loss {float(self.trainer.callback_metrics['loss']):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--resume", help="checkpoint to go on from")
    parser.add_argument("--save", help="where to write a checkpoint at the end")
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, 64, generator=torch.Generator().manual_seed(0), shuffle=True)
    trainer.fit(Classifier(options.epochs), loader, ckpt_path=options.resume)
    if options.save:
        trainer.save_checkpoint(options.save)


if __name__ == "__main__":
    main()
