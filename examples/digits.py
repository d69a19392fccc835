"""What the loops beside this file share: scikit-learn's handwritten digits, and a small ViT of timm."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

ACCUMULATION = 2  # batches that make one update
BATCH_SIZE = 32


def datasets():
    """1397 images [1, 8, 8] with labels to train on, 400 to test."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) - 4.9) / 6
    labels = torch.tensor(digits.target)
    return TensorDataset(images[400:], labels[400:]), TensorDataset(images[:400], labels[:400])


def vit():
    """Four blocks, the same weights each time."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


@torch.no_grad()
def accuracy(model, test):
    """Share of the test images that a model finds."""
    images, labels = (tensor.to(next(model.parameters()).device) for tensor in test.tensors)
    return float((model.eval()(images).argmax(1) == labels).float().mean())
