"""Fine-tune with IAM-D in Hugging Face's Trainer: images (ViT) or padded sentences (BERT). The mixin is new.

    pip install 'gm_probe[hf,accelerate]'
    python examples/huggingface_trainer.py --model bert --bf16

The models are small and random, and the data is made up, so that nothing is downloaded. With your own model and data
sets, take ``RuleTrainer`` where you have ``Trainer``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import transformers
from torch import Tensor, nn

import gm_probe.optim


class RuleTrainer(transformers.Trainer):
    """A Trainer whose gradients come from a rule. Its checkpoints hold the rule's state with the optimizer's."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args = self.args
        self.optimizer = gm_probe.optim.IAMD(
            self.model, torch.optim.AdamW, lr=args.learning_rate, weight_decay=args.weight_decay, rho=0.1
        )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: object = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)

        def closure() -> tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                outputs = model(**inputs)
            return outputs.loss, outputs.logits

        share = 1 / self.args.gradient_accumulation_steps
        return self.optimizer.optimizer.backward(closure, weight=share) * share


def images(count: int) -> tuple[nn.Module, list[dict]]:
    """A tiny ViT, and bright and dark noise."""
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=2,
    )  # fmt: skip
    labels = torch.arange(count) % 2
    pixels = torch.randn(count, 3, 8, 8) + (2 * labels - 1)[:, None, None, None]
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
    return transformers.ViTForImageClassification(config), rows


def sentences(count: int) -> tuple[nn.Module, list[dict]]:
    """A tiny BERT, and sentences of different lengths whose words tell their class."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=2,
    )  # fmt: skip
    rows = []
    for index in range(count):
        words = torch.randint(1, 20, (int(torch.randint(3, 12, ())),)) + 20 * (index % 2)
        rows.append({"input_ids": words, "labels": index % 2})
    return transformers.BertForSequenceClassification(config), rows


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """Collate sentences into ids and an attention mask."""
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["vit", "bert"], default="vit")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", help="keep a checkpoint of every epoch here")
    parser.add_argument("--resume", help="checkpoint to go on from")
    options = parser.parse_args()
    transformers.set_seed(0)
    model, rows = images(64) if options.model == "vit" else sentences(64)
    with tempfile.TemporaryDirectory() as nowhere:
        args = transformers.TrainingArguments(
            options.out or nowhere,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            bf16=options.bf16,
            logging_strategy="epoch",
            save_strategy="epoch" if options.out else "no",
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
        )
        collate = padded if options.model == "bert" else None
        trainer = RuleTrainer(model, args, train_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint=options.resume)
    print(
        f"rule {type(trainer.optimizer.optimizer.rule).__name__} steps {trainer.optimizer.optimizer.rule.steps}"
    )


if __name__ == "__main__":
    main()
