"""A small Llama on the sources of Python's own standard library, byte by byte: end to end, and by local modules.

Run it: python language_model.py 200 (so many steps; needs localgrad[hf])
"""

import math
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import localgrad

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
SIZES = {"vocab_size": 256, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
FILES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TRAIN, HELD_OUT = (b"".join(path.read_bytes() for path in files) for files in (FILES[1:], FILES[:1]))


def windows(source, count, length=64):
    """So many windows of bytes, [count, length]."""
    starts = torch.randint(len(source) - length, (count,)).tolist()
    return torch.stack([torch.tensor(list(source[start : start + length])) for start in starts])


def perplexity(**options):
    """Of a held-out byte, after training; options are those of LocalLearner."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=256))
    learner = localgrad.LocalLearner(model, example={"input_ids": windows(TRAIN, 2)}, **options)
    learner.configure_optimizers(lambda params: torch.optim.AdamW(params, lr=3e-3))
    for _ in range(STEPS):
        ids = windows(TRAIN, 8)
        learner.step({"input_ids": ids, "labels": ids})  # the model's own shift: each byte is told the next one
    model.eval()
    ids = windows(HELD_OUT, 64)
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


print(f"end to end     {perplexity(modules=1):6.2f}")
for objective in ("feature", "solo", "lopt"):
    print(f"{objective}, K = 2 {perplexity(modules=2, objective=objective):6.2f}")
