"""An own term of the local objective: features that are mostly near zero.

Run it, or name it: localgrad train --plugin own_term --objective sparse
"""

from dataclasses import dataclass

import localgrad


class Sparsity(localgrad.Term):
    """Mean absolute value of what a module's last block gives."""

    def forward(self, inputs, outputs, batch, states=()):
        """A scalar with its graph."""
        return localgrad.TermValue(outputs.float().abs().mean())


@dataclass(frozen=True, kw_only=True)
class Sparse(localgrad.FeatureReconstruction):
    """Task loss and reconstruction, as the class that it inherits from has them, and sparse features."""

    sparsity_weight: float = 0.01

    def terms(self, site):
        """By name, each with its weight; the last module is trained on the task alone."""
        return super().terms(site) | {"sparsity": (self.sparsity_weight, Sparsity())}


localgrad.register_objective("sparse", Sparse)

if __name__ == "__main__":
    vit = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 2}
    vit["options"] = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    recipe = {"data.name": "digits", "data.limit": 256, "model": vit, "training.epochs": 2, "training.batch_size": 32}
    mine = {"local.modules": 2, "local.objective": "sparse", "local.options.sparsity_weight": 0.1}
    summary = localgrad.train({**recipe, **mine}, sinks=["console"])
    print(summary["losses"])
