"""Memory of a small Llama's training step, by estimate: end to end, recomputed, and by local modules.

    python -m research.benchmarks.language_memory

12 layers of width 384, batches of 8 sequences of 512, AdamW, fp32; of a vocabulary of 256 (bytes), and of 32,000,
where logits are most of a step. The model is outlined by its config: nothing of its size is allocated. Needs the extra
``hf``.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import localgrad
from localgrad.backbones.base import outline
from localgrad.estimating import estimate_step

BATCH, LENGTH, BYTES, WORDS = 8, 512, 256, 32_000
WAYS: dict[str, dict[str, Any]] = {
    "end to end": {"modules": 1},
    "end to end, every block recomputed": {"modules": 1, "checkpoint": "blocks"},
    "lopt, K = 2": {"modules": 2, "objective": "lopt"},
    "lopt, K = 4": {"modules": 4, "objective": "lopt"},
    "solo, K = 2": {"modules": 2, "objective": "solo"},
    "solo, K = 4": {"modules": 4, "objective": "solo"},
    "segprop, K = 4": {"modules": 4, "objective": "segprop"},
    "feature, K = 4": {"modules": 4},
}


OF_WORDS: dict[str, dict[str, Any]] = {
    "end to end": {"modules": 1},
    "end to end, logits in chunks": {"modules": 1, "chunk_logits": True},
    "lopt, K = 4": {"modules": 4, "objective": "lopt"},
    "lopt, K = 4, logits in chunks": {"modules": 4, "objective": "lopt", "chunk_logits": True},
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for vocabulary, ways in ((BYTES, WAYS), (WORDS, OF_WORDS)):
        print(f"vocabulary of {vocabulary:,}")
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            intermediate_size=1024,
            max_position_embeddings=LENGTH,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        backbone = outline(model, example={"input_ids": torch.zeros(2, LENGTH, dtype=torch.int64)})
        first = None
        for name, options in ways.items():
            learner = localgrad.LocalLearner(backbone, **options)
            peak = estimate_step(learner, BATCH, partial(torch.optim.AdamW, lr=1e-3)).peak_bytes
            first = first or peak
            print(f"{name:40} {peak / 2**20:7,.0f} MiB  {peak / first:.2f} x")


if __name__ == "__main__":
    main()
