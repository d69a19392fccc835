"""A network of one's own as stem, blocks and tail, which are proved against it when the backbone is made.

Run it, or name it: localgrad train --plugin own_backbone --model patches --img-size 8
"""

import torch
from torch import nn

import localgrad


class Embed(nn.Conv2d):
    def forward(self, images):
        return super().forward(images).flatten(2).transpose(1, 2)


class Head(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, tokens):
        return self.linear(self.norm(tokens).mean(1))


class Net(nn.Module):
    def __init__(self, num_classes, in_chans, width=32, depth=4):
        super().__init__()
        self.embed = Embed(in_chans, width, 2, stride=2)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, 64, batch_first=True) for _ in range(depth)))
        self.head = Head(width, num_classes)

    def forward(self, images):
        return self.head(self.blocks(self.embed(images)))


def patches(num_classes=10, in_chans=3, img_size=8, **options):
    net, size = Net(num_classes, in_chans, **options), (in_chans, img_size, img_size)
    return localgrad.Backbone(stem=net.embed, blocks=net.blocks, tail=net.head, model=net, input_size=size)


localgrad.register_backbone("patches", patches)

if __name__ == "__main__":
    learner = localgrad.LocalLearner(patches(), modules=4)
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    print(learner.step(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))).losses)
