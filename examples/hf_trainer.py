"""A small ViT of transformers on scikit-learn's handwritten digits, by transformers' Trainer with local modules.

Run it: python hf_trainer.py 10 (so many epochs; needs localgrad[hf])
"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from localgrad.integrations.hf import LocalTrainer

EPOCHS = float(sys.argv[1]) if len(sys.argv) > 1 else 5
SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]


def accuracy(prediction):
    """Of logits [N, 10]."""
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


torch.manual_seed(0)
config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
trainer = LocalTrainer(
    model=ViTForImageClassification(config),
    args=TrainingArguments(
        output_dir="digits",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=items[400:],
    eval_dataset=items[:400],
    compute_metrics=accuracy,
    modules=2,
)
trainer.train()
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
