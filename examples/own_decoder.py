"""An own auxiliary decoder: a hidden layer at each position, then a patch of what is predicted.

Run it, or name it: localgrad train --plugin own_decoder --decoder mlp
"""

import timm
import torch
from torch import nn

import localgrad


class MlpDecoder(localgrad.Decoder):
    """Norm, linear, GELU, linear.

    Args:
        source: layout of what the module gives.
        target: layout of what it received, which is predicted.
        hidden_width: of the layer between.
    """

    mixes_positions = False  # so that there can be no mask: nothing hidden could be found

    def __init__(self, source, target, *, hidden_width=64):
        super().__init__(source, target)
        self.net = nn.Sequential(
            nn.LayerNorm(source.width),
            nn.Linear(source.width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, self.num_outputs),
        )

    def patches(self, grid):
        """[B, H, W, D] -> [B, H, W, num_outputs]."""
        return self.net(grid)


localgrad.register_decoder("mlp", MlpDecoder)

if __name__ == "__main__":
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    objective = localgrad.FeatureReconstruction(decoder="mlp", decoder_options={"hidden_width": 48})
    learner = localgrad.LocalLearner(model, modules=2, objective=objective, input_size=(3, 32, 32))
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    result = learner.step(images, labels)
    print([{name: round(float(loss), 3) for name, loss in terms.items()} for terms in result.terms])
