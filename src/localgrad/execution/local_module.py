"""A local module: a run of blocks with its own objective, whose features leave without their graph.

``LocalModule.forward`` is the only place in the package where features are detached. Blocks, auxiliary nets and
loss stand in one ``forward``, so that wrapping, compiling or distributing a local module sees all its parameters used
exactly once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from localgrad._halves import find_pieces, whole_block
from localgrad.backbone import Backbone, Layout
from localgrad.execution.checkpointing import Part, Recomputed
from localgrad.objectives.base import LocalBatch, LocalObjective, ObjectiveValue, Site
from localgrad.objectives.methods import Objective
from localgrad.partition import Checkpointing, Plan


class LocalOutput(NamedTuple):
    """What a local module gives for one batch.

    Attributes:
        features: its output, detached, for the next module (the model's logits for the last one).
        loss: its local objective, a scalar with the graph of this module only.
        terms: each term's own unweighted loss, detached.
        logits: class logits [B, num_classes], detached; ``None`` where the objective has no classifier.
    """

    features: Tensor
    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None


class LocalModule(nn.Module):
    """A run of blocks with its own objective.

    Args:
        parts: the stem (first module only), the blocks, the tail (last module only), in order.
        objective: what the module is trained on; owns the auxiliary nets.
        recomputed: by number of a part, what stands in for it in training: the same function, which keeps less and
            recomputes it in the backward pass.
    """

    def __init__(
        self, parts: Sequence[nn.Module], objective: LocalObjective, recomputed: Mapping[int, Recomputed] | None = None
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.objective = objective
        self.recomputed = dict(recomputed or {})

    def features(self, inputs: Tensor) -> Tensor:
        """Run the parts in order: image or features in, features (or the model's logits) out."""
        for number, part in enumerate(self.parts):
            run: Part = self.recomputed.get(number, part) if self.training else part
            inputs = run(inputs)
        return inputs

    def forward(self, inputs: Tensor, batch: LocalBatch) -> LocalOutput:
        """Compute features and loss.

        Args:
            inputs: what the module before gave; the images [B, C, H, W] for the first one.
            batch: images and labels.

        Returns:
            Detached features, the loss with its graph, and detached figures.
        """
        outputs = self.features(inputs)
        value: ObjectiveValue = self.objective(inputs, outputs, batch)
        return LocalOutput(
            features=outputs.detach(),
            loss=value.loss,
            terms={name: term.detach() for name, term in value.terms.items()},
            logits=None if value.logits is None else value.logits.detach(),
        )


def build_local_modules(backbone: Backbone, plan: Plan, objective: Objective) -> list[LocalModule]:
    """Make the local modules of a plan from a backbone's parts; auxiliary nets join the backbone's device.

    Args:
        backbone: a split model; its parts are shared, not copied.
        plan: boundaries, and which modules checkpoint inside.
        objective: what every module but the last is trained on.

    Raises:
        BackboneError: a parameter is shared across a boundary.
    """
    backbone.check_boundaries(plan.boundaries)
    image = Layout(kind="NCHW", width=backbone.input_size[0], grid=backbone.input_size[1:])
    device = next(backbone.parameters()).device
    modules = []
    for index, span in enumerate(plan.spans):
        first, last = index == 0, index == plan.num_modules - 1
        site = Site(
            index=index,
            num_modules=plan.num_modules,
            inputs=image if first else backbone.layouts[span.start],
            outputs=backbone.layouts[span.stop],
            image=image,
            num_classes=backbone.num_classes,
        )
        stem, tail = [backbone.stem] * first, [backbone.tail] * last
        recomputed = recomputed_in(backbone, plan, index)
        parts = [*stem, *(backbone.blocks[i] for i in span), *tail]
        modules.append(LocalModule(parts, objective.build(site).to(device), recomputed))
    return modules


def recomputed_in(backbone: Backbone, plan: Plan, index: int) -> dict[int, Recomputed]:
    """What stands in for the parts of a plan's local module in training, by number of the part."""
    how, span = plan.checkpointing(index), plan.spans[index]
    if how.level == "none":
        return {}
    before = 1 if index == 0 else 0  # the stem
    return {before + number: recompute(backbone, block, how) for number, block in enumerate(span[: how.first])}


def recompute(backbone: Backbone, index: int, how: Checkpointing) -> Recomputed:
    """What stands in for a block in training under a level of checkpointing.

    Args:
        backbone: a split model.
        index: number of the block.
        how: ``blocks`` or ``halves``.
    """
    block = backbone.blocks[index]
    if how.level == "blocks" and how.chunks == 1:
        return Recomputed([whole_block(block)])
    return Recomputed(find_pieces(block, backbone.example(index), halves=how.level == "halves"), how.chunks)
