"""The methods by name: each an ``Objective`` that composes terms.

========================= ============================================== ===========================
objective                 terms of every local module but the last       source
========================= ============================================== ===========================
``FeatureReconstruction`` task loss, reconstruction of the module's input arXiv 2212.14215
``ImageReconstruction``   task loss, reconstruction of the image          InfoPro, arXiv 2101.10832
``GreedySupervised``      task loss                                       arXiv 1812.11446, 1901.08164
``Contrastive``           supervised contrastive, image reconstruction    InfoPro's other form
``Lopt``                  10 / (K - 1) times reconstruction of the input  LoPT, arXiv 2605.04913
``Solo``                  task loss of the model's own output embedding   SOLO
``Segprop``               task loss of a copy of the model's own end      SegProp (TMLR 2026)
========================= ============================================== ===========================

Whatever the objective, the last local module is trained on the task loss of the model's own tail: it is what
end-to-end training would do with those blocks, and with one local module the whole is end-to-end training. With more of
them, a transport penalty goes to the last one, too.

The copies of arXiv 2212.14215 that can be had don't tell its loss weights; those here are ours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from torch import Tensor, nn

from localgrad import rules
from localgrad.backbones.base import Layout
from localgrad.errors import RecipeError, arg, did_you_mean
from localgrad.objectives.auxiliary import CLASSIFIERS, DECODERS, build_classifier, build_decoder, register_classifier
from localgrad.objectives.base import ContextSupply, LocalObjective, Term
from localgrad.objectives.readouts import OwnHead, ReadoutClassifier, TailClassifier
from localgrad.objectives.reconstruction import ERRORS, BlockReconstruction, Reconstruction
from localgrad.objectives.regularisers import BranchTransport, SimilarityMatching, Transport
from localgrad.objectives.site import Site, Weight
from localgrad.objectives.supervised import SupervisedContrastive, TaskLoss
from localgrad.registry import Registry, misfit

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Description of a local objective, without shapes; ``build`` makes the objective of one local module.

    What stands here goes with every objective: remedies for what local training loses. A weight is a number, or two
    to go linearly from the first local module to the last but one.

    Attributes:
        label_smoothing: of every task loss, also the last module's; from 0 to 1.
        transport_tau: transport penalty over the module's blocks (TRGL, arXiv 2309.17357); off by default.
        transport_per: what the penalty is charged on: each ``block`` as a whole, or each residual ``branch`` (attention
            and MLP apart), as TRGL does.
        similarity_weight: weight of similarity matching (arXiv 1901.06656).
        contrastive_weight: weight of the supervised contrastive loss (arXiv 2004.11362).
        temperature: of the contrastive loss.
        reconcile: weight with which the gradient at a module's input is drawn towards the one that the module before
            had at its output (SGR, arXiv 2406.05222); two more passes through the module a step.
        context: share of the training during which later modules get pooled features of earlier ones (ContSup,
            arXiv 2312.07636), fading to nothing; 0 for none. In your own loop call ``LocalLearner.at``.
        over_time: by a term's name, a second factor of its weight at the start and at the end of the training; in your
            own loop call ``LocalLearner.at``.
    """

    label_smoothing: float = 0.0
    transport_tau: Weight | None = None
    transport_per: str = "block"
    similarity_weight: Weight = 0.0
    contrastive_weight: Weight = 0.0
    temperature: float = 0.1
    reconcile: Weight = 0.0
    context: float = 0.0
    over_time: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def looks_inside(self) -> bool:
        """Whether what is built depends on more than the layouts of a module's inputs and outputs.

        Of a user's own class that isn't known, so it is taken to.
        """
        is_ours = all(kind.__module__.startswith("localgrad.") for kind in (type(self), *self.nets))
        return self.transport_tau is not None or self.context > 0 or not is_ours

    @property
    def looks_ahead(self) -> bool:
        """Whether what is built is made of the blocks that follow a module."""
        return False

    @property
    def nets(self) -> tuple[type[nn.Module], ...]:
        """Classes of the auxiliary nets that it names."""
        named = (("classifier", CLASSIFIERS), ("decoder", DECODERS))
        return tuple(known.find(getattr(self, name)) for name, known in named if hasattr(self, name))

    def with_pixels(self, mean: Sequence[float], std: Sequence[float]) -> Objective:
        """The same for images whose pixels from 0 to 1 were normalised with these, per channel, where it matters."""
        return self

    @property
    def described(self) -> str:
        """A text that is the same for objectives whose steps need the same memory and time."""
        names = [entry.name for entry in fields(self) if entry.name != "label_smoothing"]
        defaults = {entry.name: entry.default for entry in fields(self)}
        given = {name: value for name in names if (value := getattr(self, name)) not in (defaults[name], {})}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @abstractmethod
    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the terms of every local module but the last, by name, each with its weight."""

    @property
    def compares_images(self) -> bool:
        """Whether a term compares the images of a batch with one another, so that it matters how a batch is cut."""
        return _is_on(self.contrastive_weight) or _is_on(self.similarity_weight)

    def build(self, site: Site) -> LocalObjective:
        """Make the objective of the local module at ``site``.

        Raises:
            RecipeError: a weight is no number or negative, every weight is zero, or another option is impossible.
        """
        self.check()
        if self.label_smoothing and not site.loss.smooths:
            raise RecipeError(f"{arg('label_smoothing')} is of classes, and this loss isn't; leave it out.")
        if self.context and site.outputs.kind == "sequence":
            raise RecipeError(
                "context: it is a small grid of each image's features, and these are sequences, of which it would show "
                "what is to come; leave it out."
            )
        reconcile = _at(site, "reconcile", self.reconcile) if site.index else 0.0
        if reconcile < 0:
            raise RecipeError(f"reconcile is {reconcile} in local module {site.index}; it can't be negative.")
        context = ContextSupply(site, self.context) if self.context and site.index else None
        if site.is_last:
            return self._of_last(site, context, reconcile)
        self._check_site(site)
        described = self.terms(site) | self._regularisers(site)
        weighted = {name: (_at(site, name, weight), term) for name, (weight, term) in described.items()}
        for name, (weight, _) in weighted.items():
            if weight < 0:
                raise RecipeError(f"weight of {name!r} is {weight} in local module {site.index}; it can't be negative.")
        # A factor that is 0 from the start to the end leaves a term out, too.
        kept = {name: pair for name, pair in weighted.items() if pair[0] > 0 and any(self.over_time.get(name, (1.0,)))}
        if not kept:
            raise RecipeError(
                f"local module {site.index} has nothing to learn: every weight of {type(self).__name__} is 0."
            )
        for name in self.over_time:
            if name not in described:
                raise RecipeError(
                    f"over_time: there is no term {name!r}; here there are {', '.join(described)}."
                    f"{did_you_mean(name, described)}"
                )
        return LocalObjective(
            {name: term for name, (_, term) in kept.items()},
            {name: weight for name, (weight, _) in kept.items()},
            over_time=self.over_time,
            context=context,
            reconcile=reconcile,
        )

    def _of_last(self, site: Site, context: ContextSupply | None, reconcile: float) -> LocalObjective:
        head = nn.Identity() if site.head is None else OwnHead(site.outputs, site.head)
        terms: dict[str, Term] = {"task": TaskLoss(head, self.label_smoothing, loss=site.loss)}
        if site.index and self.transport_tau is not None:
            terms["transport"] = self._transport(site)
        over_time = {name: ends for name, ends in self.over_time.items() if name == "transport"}
        return LocalObjective(
            terms, dict.fromkeys(terms, 1.0), over_time=over_time, context=context, reconcile=reconcile
        )

    def _check_site(self, site: Site) -> None:
        """Refuse what compares classes of items, where labels are something else."""
        if site.loss.is_of_classes:
            return
        names = ["contrastive_weight", "similarity_weight", "teacher_share"]
        given = [name for name in names if _is_on(getattr(self, name, 0))]
        if given:
            raise RecipeError(f"{given[0]}: it is of classes, one an item, and labels here aren't; leave it out.")

    def check(self) -> None:
        """Refuse options that can't be, as far as no module has to be known.

        Raises:
            RecipeError: an impossible value, or the name of an auxiliary net that there isn't.
        """
        for name in ("over_time", "classifier_options", "decoder_options"):
            if not isinstance(getattr(self, name, {}), Mapping):
                raise RecipeError(
                    f"{name}: got {getattr(self, name)!r}; give a dict of names and values, or leave it out."
                )
        tuple(self.nets)  # each is known
        if not (is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            raise RecipeError(f"{arg('label_smoothing')} must be from 0 to below 1, got {self.label_smoothing!r}.")
        if not (is_number(self.context) and 0 <= self.context <= 1):
            raise RecipeError(f"context must be a share of the training, from 0 to 1, got {self.context!r}.")
        if self.transport_per not in ("block", "branch"):
            raise RecipeError(f"transport_per: unknown {self.transport_per!r}; take block or branch.")
        for name, ends in self.over_time.items():
            if (
                not isinstance(ends, (tuple, list))
                or len(ends) != 2
                or not all(is_number(end) and 0 <= end < math.inf for end in ends)
            ):
                raise RecipeError(
                    f"over_time: {name} = {ends!r}; give the factors at start and end, such as [1.0, 0.0]."
                )

    def _regularisers(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        found: dict[str, tuple[Weight, Term]] = {}
        if _is_on(self.contrastive_weight):
            if not (is_number(self.temperature) and 0 < self.temperature < math.inf):
                raise RecipeError(f"temperature of the contrastive loss must be above 0, got {self.temperature!r}.")
            contrastive = SupervisedContrastive(
                site.outputs, site.num_classes, temperature=self.temperature, has_padding=site.has_padding
            )
            found["contrastive"] = self.contrastive_weight, contrastive
        if _is_on(self.similarity_weight):
            matching = SimilarityMatching(site.outputs, site.num_classes, has_padding=site.has_padding)
            found["similarity"] = self.similarity_weight, matching
        if self.transport_tau is not None:
            found["transport"] = 1.0, self._transport(site)
        return found

    def _transport(self, site: Site) -> Transport | BranchTransport:
        tau = _at(site, "transport_tau", cast(Weight, self.transport_tau))
        if not tau > 0:
            raise RecipeError(f"transport_tau must be above 0, got {self.transport_tau}; leave it out for no penalty.")
        if self.transport_per == "block":
            return Transport(tau, has_padding=site.has_padding, ends_in_tail=site.is_last)
        return BranchTransport(tau, has_padding=site.has_padding)


@dataclass(frozen=True, kw_only=True)
class GreedySupervised(Objective):
    """Each module is trained on its auxiliary classifier's task loss alone.

    Attributes:
        classifier: auxiliary classifier: ``linear``, ``mlp``, ``transformer``, ``next`` (the blocks that follow),
            ``readout`` (the model's own output embedding, read only), ``tail`` (copies of its last blocks and its own
            end), or one that was registered.
        classifier_options: keyword arguments of that classifier; a pair of whole numbers goes from the first local
            module to the last but one (``depth = [3, 1]``: shallower towards the output, AugLocal, arXiv 2402.17318).
        task_weight: weight of the task loss.
        teacher_share: share of the task loss that is taught by the averaged model (``ema_decay``), and not by labels:
            distillation (arXiv 1503.02531) from a mean teacher (arXiv 1703.01780).
    """

    classifier: str = "transformer"
    classifier_options: Options = field(default_factory=dict)
    task_weight: Weight = 1.0
    teacher_share: Weight = 0.0

    @property
    def looks_inside(self) -> bool:
        """Whether what is built depends on more than the layouts of a module's inputs and outputs."""
        return super().looks_inside or CLASSIFIERS.find(self.classifier).looks_ahead

    @property
    def looks_ahead(self) -> bool:
        """Whether what is built is made of the blocks that follow a module, or of the model's own end."""
        kind = CLASSIFIERS.find(self.classifier)
        return kind.looks_ahead or kind.looks_at_tail

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term."""
        share = _at(site, "teacher_share", self.teacher_share)
        if not 0 <= share <= 1:
            raise RecipeError(f"teacher_share must be from 0 to 1, got {self.teacher_share}.")
        options = _for_depth(site, self.classifier_options)
        classifier = build_classifier(
            self.classifier,
            site.outputs,
            site.num_classes,
            options,
            site.following,
            undecayed=site.undecayed,
            tail=site.tail,
            per_token=site.loss.names_tokens,
        )
        term = TaskLoss(classifier, self.label_smoothing, share, site.loss, has_padding=site.has_padding)
        return {"task": (self.task_weight, term)}


@dataclass(frozen=True, kw_only=True)
class Reconstructing(Objective):
    """What objectives with an auxiliary decoder share.

    Attributes:
        decoder: auxiliary decoder: ``linear``, ``bottleneck`` (LoPT's), ``conv``, ``transformer``, ``bilinear``
            (InfoPro's own, which costs more memory than it saves), or one that was registered.
        decoder_options: keyword arguments of that decoder; pairs as for the classifier.
        reconstruction_weight: weight of the reconstruction error; 0 leaves the decoder out.
    """

    decoder: str = "linear"
    decoder_options: Options = field(default_factory=dict)
    reconstruction_weight: Weight = 1.0

    def reconstruction(
        self,
        site: Site,
        target: Layout,
        *,
        of: str,
        error: str = "mse",
        mask: float = 0.0,
        normalise: bool = False,
        pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> Reconstruction:
        """Make the reconstruction term of a target, with a decoder of its own. Arguments as for ``Reconstruction``.

        Raises:
            RecipeError: an unknown error, or one or a mask that doesn't go with the target or the decoder.
        """
        if error not in ERRORS:
            raise RecipeError(
                f"reconstruction_error: unknown {error!r}; take {', '.join(ERRORS)}.{did_you_mean(error, ERRORS)}"
            )
        if error == "bce" and pixels is None:
            raise RecipeError(
                "reconstruction_error: 'bce' is of pixels; take it with the objective 'image', or take mse."
            )
        if not (is_number(mask) and 0 <= mask < 1):
            raise RecipeError(f"mask must be a share of the positions, from 0 to below 1, got {mask!r}.")
        decoder = build_decoder(self.decoder, site.outputs, target, _for_depth(site, self.decoder_options))
        if mask and not decoder.mixes_positions:
            raise RecipeError(
                f"mask: the decoder {self.decoder!r} sees one position at a time, so it can't find a hidden one; take "
                "conv or transformer."
            )
        normalise = normalise and target is not site.image  # features may be as wide as what enters the model
        return Reconstruction(
            decoder,
            of=of,
            normalise=normalise,
            error=error,
            mask=mask,
            pixels=pixels,
            has_padding=site.has_padding,
        )


@dataclass(frozen=True, kw_only=True)
class FeatureReconstruction(Reconstructing, GreedySupervised):
    """The method of arXiv 2212.14215: task loss, and reconstruction of the features that the module received.

    The first module received the image, so it reconstructs its pixels.

    Attributes:
        normalise_targets: layer-normalise each position of feature targets (never of pixels).
        reconstruct: what is reconstructed: what the module received (``inputs``), what the module before received
            (``previous``), or what entered each of its blocks (``blocks``).
        reconstruction_error: ``mse``, ``smooth_l1`` or ``cosine``.
        mask: share of positions that is hidden from the decoder, and alone counts; for decoders that mix positions.
    """

    normalise_targets: bool = True
    reconstruct: str = "inputs"
    reconstruction_error: str = "mse"
    mask: float = 0.0

    @property
    def looks_inside(self) -> bool:
        """Whether what is built depends on more than the layouts of a module's inputs and outputs."""
        return super().looks_inside or self.reconstruct == "blocks"

    def check(self) -> None:
        """As of any objective."""
        super().check()
        rules.check({"reconcile": self.reconcile, "reconstruct": self.reconstruct})
        if self.reconstruct not in ("inputs", "previous", "blocks"):
            raise RecipeError(f"reconstruct: unknown {self.reconstruct!r}; take inputs, previous or blocks.")

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term and the reconstruction term."""
        term = self._reconstruction(site)
        return super().terms(site) | {"reconstruction": (self.reconstruction_weight, term)}

    def _reconstruction(self, site: Site) -> Term:
        if self.reconstruct == "blocks":
            # The first block of a module received what the module received; of the first module, the stem's output.
            return BlockReconstruction([self._of(site, layout, "inputs") for layout in site.states])
        if self.reconstruct == "previous":
            if site.index == 1 and site.image.kind == "sequence" and site.previous != site.image:
                raise RecipeError(
                    "reconstruct: 'previous' of the second module are token ids, which no decoder predicts; take "
                    "inputs (of the first module their embedding) or blocks."
                )
            return self._of(site, site.previous or site.inputs, "previous" if site.index else "inputs")
        return self._of(site, site.inputs, "inputs")

    def _of(self, site: Site, target: Layout, of: str) -> Reconstruction:
        return self.reconstruction(
            site, target, of=of, error=self.reconstruction_error, mask=self.mask, normalise=self.normalise_targets
        )


@dataclass(frozen=True, kw_only=True)
class ImageReconstruction(Reconstructing, GreedySupervised):
    """InfoPro on transformers: task loss, and reconstruction of the image by every module.

    Attributes:
        reconstruction_error: ``mse``, ``smooth_l1`` or ``cosine`` of normalised pixels; or ``bce``, InfoPro's own:
            binary cross-entropy of pixels from 0 to 1.
        mask: share of positions that is hidden from the decoder, and alone counts; for decoders that mix positions.
        pixel_mean: per channel, of pixels from 0 to 1: what images were normalised with, for ``bce``. A recipe takes
            its data set's.
        pixel_std: likewise.
    """

    reconstruction_error: str = "mse"
    mask: float = 0.0
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None

    def with_pixels(self, mean: Sequence[float], std: Sequence[float]) -> Objective:
        """The same for images that were normalised with these, where it isn't told yet and looked at."""
        if self.reconstruction_error != "bce" or self.pixel_mean is not None or self.pixel_std is not None:
            return self
        return replace(self, pixel_mean=tuple(mean), pixel_std=tuple(std))

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term and the reconstruction term.

        Raises:
            RecipeError: inputs are token ids, and no images.
        """
        _check_is_image(site)
        pixels = self._pixels(site) if self.reconstruction_error == "bce" else None
        term = self.reconstruction(
            site, site.image, of="image", error=self.reconstruction_error, mask=self.mask, pixels=pixels
        )
        return super().terms(site) | {"reconstruction": (self.reconstruction_weight, term)}

    def _pixels(self, site: Site) -> tuple[Sequence[float], Sequence[float]]:
        mean, std, width = self.pixel_mean, self.pixel_std, site.image.width
        if mean is None or std is None:
            raise RecipeError(
                "reconstruction_error: 'bce' compares pixels from 0 to 1; give pixel_mean and pixel_std, per channel, "
                "with which images were normalised."
            )
        if not (
            isinstance(mean, (tuple, list))
            and isinstance(std, (tuple, list))
            and len(mean) == len(std) == width
            and all(is_number(value) for value in (*mean, *std))
            and all(map(math.isfinite, mean))
            and all(0 < s < math.inf for s in std)
        ):
            raise RecipeError(
                f"pixel_mean and pixel_std: {mean} and {std}; give {width} finite numbers each, std above 0."
            )
        return mean, std


@dataclass(frozen=True, kw_only=True)
class Contrastive(Reconstructing):
    """InfoPro's contrastive form: supervised contrastive loss, and reconstruction of the image.

    Its early modules have no classifier, so no accuracy of their own is reported.

    Attributes:
        contrastive_weight: weight of the contrastive loss.
    """

    contrastive_weight: Weight = 1.0

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the reconstruction term; the contrastive one is any objective's.

        Raises:
            RecipeError: inputs are token ids, and no images.
        """
        _check_is_image(site)
        return {"reconstruction": (self.reconstruction_weight, self.reconstruction(site, site.image, of="image"))}


def _check_is_image(site: Site) -> None:
    if site.image.kind == "sequence":
        raise RecipeError(
            "objective: it reconstructs images, and what this model is given is a sequence; take 'feature' or 'lopt', "
            "which reconstruct features (of token ids their embedding)."
        )


@dataclass(frozen=True, kw_only=True)
class Lopt(Reconstructing):
    """LoPT (arXiv 2605.04913): modules below the last one reconstruct what they received, and nothing else.

    ``CE + 10 x mean over those modules b of MSE(D(h_b), stopgrad(h_(b-1)))``, with ``D`` norm, linear to a quarter of
    the width, GELU, linear; so each module's weight is ``10 / (K - 1)``. The first module received token ids, so it
    reconstructs their embedding; of a vision model the image. There is no classifier below the last module. Targets
    aren't normalised. (The released code sums all losses into one backward pass, which frees nothing; a backward pass
    for each gives the same gradients.)

    Attributes:
        decoder: auxiliary decoder, see ``FeatureReconstruction``.
        reconstruction_weight: of the mean over modules.
    """

    decoder: str = "bottleneck"
    reconstruction_weight: Weight = 10.0

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the reconstruction term."""
        weight = _at(site, "reconstruction", self.reconstruction_weight) / (site.num_modules - 1)
        return {"reconstruction": (weight, self.reconstruction(site, site.inputs, of="inputs"))}


@dataclass(frozen=True, kw_only=True)
class Solo(GreedySupervised):
    """SOLO: each module's task loss is read out by the model's own output embedding, which no other module trains.

    ``CE(E stopgrad'd: norm(private blocks(h_b)) E^T)``. With a private block or two in between, gradients come nearer
    to end-to-end ones; ``classifier_options={"depth": 1}`` gives one.
    """

    classifier: str = "readout"


@dataclass(frozen=True, kw_only=True)
class Segprop(GreedySupervised):
    """SegProp (TMLR 2026): each module's classifier is a copy of the model's own last blocks and of its own end.

    ``CE(tail_b(last blocks_b(h_b)))``, both initialised as the model's and trained with module b.
    ``classifier_options={"depth": 2}`` takes two blocks, 0 none.
    """

    classifier: str = "tail"


OBJECTIVES: Registry[type[Objective]] = Registry("objective", Objective)


def register_objective(name: str, objective: type[Objective]) -> None:
    """Give an objective a name, by which recipes and the command line choose it.

    Args:
        name: for ``local.objective`` and ``--objective``.
        objective: called with ``local.options``; a frozen dataclass whose fields are its options.

    Raises:
        RecipeError: the name is another's, or the class is no objective.
    """
    OBJECTIVES.register(name, objective)


register_classifier("readout", ReadoutClassifier)
register_classifier("tail", TailClassifier)
register_objective("feature", FeatureReconstruction)
register_objective("image", ImageReconstruction)
register_objective("greedy", GreedySupervised)
register_objective("contrastive", Contrastive)
register_objective("lopt", Lopt)
register_objective("solo", Solo)
register_objective("segprop", Segprop)


def is_number(value: object) -> bool:
    """Whether an option is a number that can be compared, and not a text, a list, or yes and no."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) or (hasattr(value, "__float__") and not isinstance(value, Tensor))


def _is_on(weight: Weight) -> bool:
    return weight not in (0, (0, 0), [0, 0])


def _for_depth(site: Site, options: Options) -> Options:
    """Options in which a pair of whole numbers is its value at this depth."""
    pairs = {
        name: round(site.weight(tuple(value)))
        for name, value in options.items()
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(end, int) for end in value)
    }
    return {**options, **pairs}


def _at(site: Site, name: str, weight: Weight) -> float:
    try:
        value = math.nan if isinstance(weight, bool) else site.weight(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RecipeError(
            f"weight of {name!r} is {weight!r}; give a number, or two to go from the first local module to the last, "
            "such as [1.0, 0.5]."
        )
    return value


def build_objective(name: str, options: Options) -> Objective:
    """Make an objective by name, as recipes do.

    Raises:
        RecipeError: unknown name, or options that this objective doesn't take.
    """
    kind = OBJECTIVES.find(name)
    try:
        return kind(**options)
    except TypeError as error:
        raise RecipeError(f"objective {name!r} {misfit(kind, options, error)}") from error
