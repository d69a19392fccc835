"""What a local module is trained on: a weighted sum of named terms, built for the module's place in the model.

Two halves. An ``Objective`` is what the user writes: a small immutable description with no shapes in it
(``FeatureReconstruction(decoder="conv")``). ``Objective.build`` turns it into a ``LocalObjective`` for one
``Site``: an ``nn.Module`` that owns the auxiliary nets, so that a local module has one ``parameters()``, and
export simply drops the objective. This file has what both halves need; the objectives by name are in ``methods.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.errors import RecipeError
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.site import Site


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as rows, float32 [B, num_classes]: soft ones as they are, class indices one-hot, ignored ones all 0."""
    if labels.is_floating_point():
        return labels.float()
    return (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)).float()


def in_float32(tensor: Tensor) -> Tensor:
    """A tensor as losses are computed on it: in float32, or in float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class TermValue(NamedTuple):
    """One term's loss, and the class logits [B, num_classes] where computing it makes any.

    Attributes:
        loss: a mean over the items of the batch, or of the part of one that the term was given.
        logits: as made on the way.
        is_share: of a part of a batch: ``loss`` is its share of the whole batch's, and no mean over the part.
    """

    loss: Tensor
    logits: Tensor | None = None
    is_share: bool = False


class Term(nn.Module, ABC):
    """One term of a local objective; owns the auxiliary net that it needs."""

    uses: frozenset[str] = frozenset()
    """What the term looks at besides the module's inputs and outputs: what the batch carries, by name (``images``,
    ``previous``, your own; see ``objectives/carried.py``), ``branches`` of the batch, or ``states``."""

    @abstractmethod
    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the term.

        Args:
            inputs: what the module received, detached; the image for the first module.
            outputs: what its last block gave (the model's logits for the last module).
            batch: image and labels, and what else the term uses.
            states: what entered each of the module's blocks, and the model's tail, with its graph; empty unless the
                term uses it.

        Returns:
            A scalar loss, in float32 (float64 for a model in that), and logits where there are any.
        """

    def classify(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Class logits [B, num_classes] from the module's outputs, ``None`` for a term that has no classifier.

        Only a term that ``uses`` the mask is given it, bool [B, N].
        """
        return None

    def follow(self) -> None:
        """Called after each update of the module: what follows other modules' weights takes a step towards them."""


class ObjectiveValue(NamedTuple):
    """The total loss (a scalar with a graph), each term's own unweighted loss, and logits where there are any.

    Of a part of a batch, losses are its share of the batch's: those of all parts add up.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None


class ContextSupply(nn.Module):
    """Adds pooled features of earlier modules to what a module receives, while it is young.

    Context supply (ContSup, arXiv 2312.07636) gives later modules what the modules before them have thrown away. There
    it stays in the network. Here the result has to be the plain timm model, so the context fades: its factor goes
    linearly from 1 to 0 over the first part of training, and it never enters in evaluation mode. The projection starts
    at zero, so that nothing is changed at first.

    Args:
        site: where the module stands.
        until: share of the training after which no context enters.
    """

    factor: Tensor

    def __init__(self, site: Site, until: float) -> None:
        super().__init__()
        self.layout = site.inputs
        self.until = until
        self.enter = nn.ModuleList(nn.Linear(layout.width, site.inputs.width) for layout in site.context)
        for linear in self.enter:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        self.register_buffer("factor", torch.ones(()), persistent=False)
        self.is_over = False

    def at(self, progress: float) -> None:
        """Set the factor for a share of the training that is over."""
        self.is_over = progress >= self.until
        self.factor.fill_(max(0.0, 1 - progress / self.until))

    def forward(self, inputs: Tensor, context: Sequence[Tensor]) -> Tensor:
        """The module's input with the context added: of each earlier module, [B, rows, columns, D]."""
        total: Tensor | None = None
        for linear, pooled in zip(self.enter, context, strict=True):
            grid = F.interpolate(linear(pooled).permute(0, 3, 1, 2), self.layout.grid, mode="nearest")
            total = grid if total is None else total + grid
        assert total is not None, "a module with context is not the first"
        return self.layout.add(inputs, (total * self.factor).permute(0, 2, 3, 1))


def _share_of(value: TermValue, share: float | None) -> Tensor:
    return value.loss if value.is_share or share is None else value.loss * share


class LocalObjective(nn.Module):
    """The weighted sum of named terms that one local module is trained on.

    Args:
        terms: by name, in the order in which they are computed.
        weights: factor of each term, by the same names.
        over_time: for some of the names, a second factor at the start and at the end of the training, linear between.
        context: what the module gets of earlier ones, beside its input.
        reconcile: weight with which the gradient at the module's input is drawn towards that of the module before.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        weights: Mapping[str, float],
        *,
        over_time: Mapping[str, tuple[float, float]] | None = None,
        context: ContextSupply | None = None,
        reconcile: float = 0.0,
    ) -> None:
        super().__init__()
        assert terms.keys() == weights.keys(), "each term has a weight"
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.over_time = {name: ends for name, ends in (over_time or {}).items() if name in terms}
        self.context = context
        self.reconcile = reconcile
        for name, (start, _) in self.over_time.items():
            # A tensor, so that a compiled module is not compiled anew whenever it changes.
            self.register_buffer(f"factor_of_{name}", torch.tensor(float(start)), persistent=False)
        uses = [cast(Term, term).uses for term in self.terms.values()]
        self.uses = frozenset().union(
            *uses, *([{"context"}] if context else []), *([{"gradient"}] if reconcile else [])
        )

    def at(self, progress: float) -> None:
        """Set what changes over time for a share of the training that is over, from 0 to 1."""
        for name, (start, end) in self.over_time.items():
            self.get_buffer(f"factor_of_{name}").fill_(start + (end - start) * progress)
        if self.context is not None:
            self.context.at(progress)

    def enter(self, inputs: Tensor, batch: LocalBatch) -> Tensor:
        """What the module's parts are given: what it received, and in training the context."""
        if self.context is None or self.context.is_over or not self.training:
            return inputs
        entered: Tensor = self.context(inputs, batch.context)
        return entered

    def forward(
        self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()
    ) -> ObjectiveValue:
        """Compute every term and their weighted sum. Arguments as in ``Term.forward``."""
        values: dict[str, TermValue] = {name: term(inputs, outputs, batch, states) for name, term in self.terms.items()}
        for name, value in values.items():
            if not isinstance(value, TermValue) or not isinstance(value.loss, Tensor) or value.loss.ndim:
                gave = value.loss if isinstance(value, TermValue) else value
                said = f"a tensor of shape {list(gave.shape)}" if isinstance(gave, Tensor) else repr(gave)
                raise RecipeError(f"term {name!r}: it gave {said}; let forward return TermValue(loss), a scalar.")
        terms = {name: _share_of(value, batch.share) for name, value in values.items()}
        losses = [self._weighted(name, loss) for name, loss in terms.items()]
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        logits = next((value.logits for value in values.values() if value.logits is not None), None)
        return ObjectiveValue(total, terms, logits)

    def _weighted(self, name: str, loss: Tensor) -> Tensor:
        if name in self.over_time:
            loss = loss * self.get_buffer(f"factor_of_{name}")
        weight = self.weights[name]
        return loss if weight == 1.0 else loss * weight  # keeps a lone task loss free of one more node

    def classify(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Class logits from the module's outputs; ``None`` where no term has a classifier.

        Args:
            outputs: what the module's last block gave.
            mask: which tokens of sequences aren't padding, bool [B, N]; by default all.
        """
        for term in self.terms.values():
            looks = mask is not None and "mask" in cast(Term, term).uses
            logits: Tensor | None = term.classify(outputs, mask) if looks else cast(Term, term).classify(outputs)  # type: ignore[operator]
            if logits is not None:
                return logits
        return None

    def follow(self) -> None:
        """Let what follows other modules' weights take a step; called after each update."""
        for term in self.terms.values():
            cast(Term, term).follow()
