"""A small ViT of transformers in transformers' Trainer, whose training step is that of local modules.

Run it: python loop_trainer.py 4 (so many epochs; stop it, and run it again: it goes on; needs localgrad[hf])
"""

import sys

import torch
from digits import ACCUMULATION, BATCH_SIZE, datasets
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import get_last_checkpoint

from localgrad.integrations.hf import LocalTrainer

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}


def accuracy(prediction):
    """Of logits [N, 10]."""
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


def main(epochs=4, modules=2, folder="loop_trainer"):
    train, test = ([{"pixel_values": x, "labels": int(y)} for x, y in dataset] for dataset in datasets())
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **SIZES)
    args = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        dataloader_drop_last=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}
    trainer = LocalTrainer(ViTForImageClassification(config), args, modules=modules, **data)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
