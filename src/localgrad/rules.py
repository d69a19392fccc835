"""What doesn't go together, and why: one table, which learners, planners, runs, the command line and the docs read.

A rule is two conditions and a reason. Whoever knows the values of some arguments calls ``check`` with them; rules on
arguments that aren't among them are passed over. So each part of the package checks what it knows, by the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from localgrad.errors import LocalgradError, RecipeError, arg

HUB_PREFIX = "hf:"
"""What the names of transformers' models begin with."""
OFF: tuple[object, ...] = (None, False, 0, "none", (0, 0))


@dataclass(frozen=True)
class Given:
    """The condition that an argument is given.

    Attributes:
        name: of the argument; its dotted key in a recipe where it has no name of its own elsewhere.
        value: which one it has; by default any that isn't off.
        off: values that are no more than not giving it.
    """

    name: str
    value: object = None
    off: tuple[object, ...] = OFF

    @property
    def key(self) -> str:
        """The argument's own name."""
        return self.name.rpartition(".")[2]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it does for some arguments' values, this one's among them."""
        value = values[self.key]
        value = tuple(value) if isinstance(value, list) else value
        return bool(value == self.value if self.value is not None else value not in self.off)

    @property
    def shown(self) -> str:
        """How the docs write it."""
        return f"`{self.said()}`"

    def said(self, value: object = None) -> str:
        """The argument as it is typed, with its value where that is a number or a word."""
        tells = isinstance(value, (int, float, str, PurePath)) and not isinstance(value, bool)
        return arg(self.name, self.value if self.value is not None else value if tells else None)


@dataclass(frozen=True)
class Absent(Given):
    """The condition that an argument isn't given; ``value`` is an example of one to add."""

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it isn't."""
        return values[self.key] in self.off

    @property
    def shown(self) -> str:
        """How the docs write it."""
        return f"no `{arg(self.name)}`"


@dataclass(frozen=True)
class OneOf(Given):
    """The condition that an argument has one of some values."""

    values: tuple[object, ...] = ()

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it has."""
        return values[self.key] in self.values

    @property
    def shown(self) -> str:
        """How the docs write it."""
        return f"{super().shown} of {', '.join(f'`{value}`' for value in self.values)}"


@dataclass(frozen=True)
class OfTransformers(OneOf):
    """The condition that a model is one of transformers."""

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is."""
        return str(values[self.key]).startswith(HUB_PREFIX)

    @property
    def shown(self) -> str:
        """How the docs write it."""
        return f"`{arg(self.name, f'{HUB_PREFIX}FOLDER')}`"


@dataclass(frozen=True)
class Rule:
    """Two conditions that don't go together, and why.

    Attributes:
        first: what is refused.
        second: beside what, or without what.
        reason: why.
    """

    first: Given
    second: Given
    reason: str

    def said(self, values: Mapping[str, Any]) -> str:
        """The rule as a sentence about what was given, which says what to type instead."""
        first, beside = self.first.said(values.get(self.first.key)), values.get(self.second.key)
        second = self.second.said(beside if isinstance(self.second, OneOf) else None)
        if isinstance(self.second, Absent):
            name = arg(self.first.name)
            return f"{first} needs {arg(self.second.name)}: {self.reason}; add {second}, or leave {name} out."
        return f"{first} doesn't go with {second}: {self.reason}; leave one of them out."


NAMED_DATA = ("digits", "cifar10", "cifar100", "stl10", "svhn")
"""Data sets that are known by name; each has a training and a test part."""

READING = (
    *("root", "on_corrupt", "train_data", "val_data", "test_data", "image_column", "label_column", "config"),
    *("image_range", "background", "fit"),
)
"""Arguments that say how images are read."""

PARALLEL = Given("parallel")
SEQUENTIAL = Given("schedule", "sequential")
OVERLAP = Given("overlap")
OFFLOAD = Given("offload")
DEVICE = Given("device")
COMPILE = Given("compile")
EMA_DECAY = Given("ema_decay")
BUDGET = Given("budget")
PATIENCE = Given("patience")
GRADIENTS = Given("gradients", off=(None, "any"))
REPLICAS = Given("replicas", off=(None, 1))
GLOBAL = (Given("global_every"), Given("global_tail"), Given("global_share"))
FREEZE_FROM = Given("freeze_from", off=(None,))
TEACHER, RECONCILE, CONTEXT = (Given(f"local.options.{name}") for name in ("teacher_share", "reconcile", "context"))


def _rules() -> Iterator[Rule]:
    at_once = "modules never train in the same step"
    for given in (*GLOBAL, OVERLAP, FREEZE_FROM, Given("warmup_stagger"), TEACHER, RECONCILE, CONTEXT):
        yield Rule(given, SEQUENTIAL, at_once)
    yield Rule(Given("local.options.reconstruct", "previous"), SEQUENTIAL, at_once)
    yield Rule(Given("classifier", "next"), SEQUENTIAL, at_once)
    yield Rule(EMA_DECAY, SEQUENTIAL, "no average of the weights is kept")
    yield Rule(OFFLOAD, SEQUENTIAL, "only one module is on the device anyway")
    yield Rule(BUDGET, SEQUENTIAL, "planners plan modules that train together")
    yield Rule(Given("plan"), SEQUENTIAL, "a plan is of modules that train together")

    whole = "no process has all local modules"
    for given in (SEQUENTIAL, *GLOBAL, OFFLOAD, Given("health_every"), TEACHER):
        yield Rule(given, PARALLEL, whole)
    yield Rule(OVERLAP, PARALLEL, "two processes would train the same blocks")
    yield Rule(DEVICE, PARALLEL, "a learner has its team's, which in a run is the run's device")
    averaged = Given("local.options.classifier_options.weights", "ema")
    yield Rule(averaged, PARALLEL, "an average of the blocks that follow needs them in one process")
    yield Rule(Given("classifier", "readout"), PARALLEL, "the output embedding is trained by another process")
    yield Rule(REPLICAS, Absent("parallel", "modules"), "only processes that share modules out have replicas")
    yield Rule(Given("shard"), Absent("parallel", "modules"), "weights are shared out among replicas")
    yield Rule(Given("shard"), Absent("replicas", 2, off=(None, 1)), "weights are shared out among replicas")
    yield Rule(COMPILE, REPLICAS, "replicas run their modules inside of DDP, not compiled")
    yield Rule(Given("num_processes"), Absent("parallel", "modules"), "it says what processes share")
    yield Rule(BUDGET, Given("parallel", "modules"), "plan first, for so many ranks, then train by that plan")
    yield Rule(Given("on_oom", "replan"), PARALLEL, "no process plans for others; resume with another checkpoint")
    ranks = OneOf("balance", values=("time", "memory"))  # of a plan; a run's are of classes
    yield Rule(ranks, Absent("parallel", 4), "it is of the modules of several ranks")
    yield Rule(GRADIENTS, PARALLEL, "ranks have a local module each")
    yield Rule(Given("frontier"), PARALLEL, "it is of plans for one process")
    yield Rule(Given("batch_size", "auto"), PARALLEL, "it is for plans of one process")

    for given in GLOBAL:
        yield Rule(OFFLOAD, given, "end-to-end steps need all modules on the device")
    yield from _rules_of_frozen_blocks()
    yield Rule(OVERLAP, FREEZE_FROM, "a frozen module's last blocks would go on learning")
    yield Rule(OVERLAP, OFFLOAD, "blocks that two modules train can't be offloaded")
    yield Rule(TEACHER, Absent("ema_decay", 0.999), "the averaged model teaches, and none is kept")
    yield Rule(RECONCILE, COMPILE, "it runs a module three times, at inputs of its own")
    yield Rule(Given("chunk_logits"), COMPILE, "chunks of logits pass by the model's own last layer")
    yield Rule(RECONCILE, OVERLAP, "modules that share blocks don't meet at one place")
    yield Rule(RECONCILE, Given("local.options.reconstruct", "blocks"), "it moves what that compares with")
    yield Rule(DEVICE, Absent("offload", value=True), "a learner trains where its model is, and a run moves the model")

    yield from _rules_of_plans()

    yield Rule(Given("health_reference"), Absent("health_every", 1), "health is not measured in this run")
    yield Rule(Given("preset"), Given("recipe"), "both say where to start")
    yield Rule(Given("pretrained"), Given("weights"), "both say what to start from")
    hub = OfTransformers("model")
    yield Rule(Given("weights"), hub, "its folder has its weights: name that as the model, and add pretrained")
    yield Rule(Given("layer_decay"), hub, "the order of layers is known of timm's models alone")
    yield Rule(Given("patch_size"), hub, "its config says it, which model.options change")
    yield Rule(Given("drop_path"), hub, "its config says it, which model.options change")
    yield Rule(Given("quantize"), Absent("lora", 8), "weights of 4 bits don't learn, adapters beside them do")
    for name in ("out", "preset", "recipe", "plan", "budget"):
        yield Rule(Given(name), Given("resume"), "the run has its recipe and folder")

    yield from _rules_of_data()
    yield from _rules_of_files()


def _rules_of_files() -> Iterator[Rule]:
    yield Rule(Given("plot"), Given("estimate_only"), "it needs step times; take a timeline instead")
    yield Rule(Given("repo"), OneOf("to", values=("timm", "onnx", "torch-export")), "only the hub has repositories")


def _rules_of_frozen_blocks() -> Iterator[Rule]:
    cached = Given("cache_frozen")
    yield Rule(cached, Absent("freeze", 0.5, off=(None,)), "it is the features of frozen blocks that are kept")
    yield Rule(cached, SEQUENTIAL, "its first module reads images")
    yield Rule(cached, PARALLEL, "the first process reads images")
    yield Rule(cached, OFFLOAD, "the frozen blocks would wait on the processor")
    yield Rule(cached, COMPILE, "compiled code has the frozen blocks in it")
    for given in (*GLOBAL, TEACHER):
        yield Rule(cached, given, "the whole model runs from images on")


def _rules_of_data() -> Iterator[Rule]:
    yield Rule(Given("num_classes"), Given("data"), "it has its own classes")
    for name in (*READING, "download"):
        yield Rule(Given(name), Absent("data", "FOLDER"), "it is of images that are read")
    for name in ("train_data", "val_data", "test_data"):
        yield Rule(Given(name), OneOf("data", values=NAMED_DATA), "it brings its own parts")
    streaming = Given("streaming")
    for name in ("image_column", "label_column", "config"):
        yield Rule(Given(name), OneOf("data", values=NAMED_DATA), "it is of tables")
    yield Rule(streaming, OneOf("data", values=NAMED_DATA), "it is of tables")
    for name in ("data.num_examples", "data.shuffle_buffer"):
        yield Rule(Given(name), Absent("streaming", value=True), "it is of a stream")
    yield Rule(Given("balance", off=(None, "none")), streaming, "labels aren't known before they are read")
    yield Rule(SEQUENTIAL, streaming, "features are kept by image, and a stream doesn't number them")
    yield Rule(Given("cache_frozen"), streaming, "features are kept by image, and a stream doesn't number them")
    yield Rule(Given("health_every"), streaming, "it measures on images chosen by class")
    yield Rule(Given("pilot"), streaming, "it needs a part of the images of every class")
    yield Rule(PARALLEL, streaming, "one process reads a stream")

    weights = Given("balance", "weights")
    yield Rule(weights, REPLICAS, "replicas weigh alike, whatever classes their images are of; sampling does it")
    yield Rule(weights, Given("objective", "contrastive"), "that weighs pairs of images alike; sampling does it")
    for name in ("data.interpolation", "data.crop"):
        yield Rule(Given(name), Absent("data.transform", "imagenet"), "it is of how a transform resizes")

    yield Rule(PATIENCE, SEQUENTIAL, "each module is trained for all its epochs")
    yield Rule(PATIENCE, Absent("val_fraction", 0.1), "validation images tell when to stop")
    for given in (GLOBAL[1], FREEZE_FROM, CONTEXT):
        yield Rule(given, PATIENCE, "its share is of all epochs, and the last ones may not come")


def _rules_of_plans() -> Iterator[Rule]:
    yield Rule(Given("card", off=(None, "auto")), Given("device", "cpu"), "processors have their machine's memory")

    decided = "a plan to a budget decides it"
    yield Rule(Given("checkpoint", off=(None,)), BUDGET, decided)
    yield Rule(Given("accumulation", off=(None,)), BUDGET, decided)
    yield Rule(OFFLOAD, BUDGET, "planners don't count on it")
    yield Rule(OFFLOAD, Given("plan"), "planners don't count on it")
    yield Rule(BUDGET, Given("plan"), "a plan has its budget already")
    yield Rule(Given("checkpoint", off=(None, False, "none")), Given("plan"), "a plan says what is recomputed")
    for name in ("auto", "any"):
        yield Rule(Given("modules", name), Absent("budget", "6GiB"), "how many is found within a budget")
    yield Rule(GRADIENTS, Absent("budget", "6GiB"), "it says which plans are looked for")
    yield Rule(Given("batch_size", "auto"), Absent("budget", "6GiB"), "it is the largest that fits")
    for name in ("method", "pilot"):
        yield Rule(Given(name), Given("plan"), "a plan says what is trained")
    for given in (Given("card", off=(None, "auto")), Given("no_cache"), Given("no_confirm")):
        for planned in (Given("plan"), Given("resume")):
            yield Rule(given, planned, "it is of planning, which was done")
    for name in ("no_cache", "no_confirm"):
        yield Rule(Given(name), Absent("budget", "6GiB"), "it is of planning to one")
    for name in ("preset", "parallel", "frontier", "num_classes", "sequence_length", "task"):
        yield Rule(Given(name), Given("finetune"), "fine-tuning has its preset, its data's classes, and one process")
    yield Rule(Given("batch_size", "auto"), Given("finetune"), "methods are compared at one batch size")
    yield Rule(GRADIENTS, Given("method"), "a method says so itself")
    yield Rule(Given("method"), Absent("finetune", value=True), "it is one of the ways to fine-tune")
    yield Rule(Given("pilot"), Absent("val_fraction", 0.1), "methods are compared on validation images")


RULES = tuple(_rules())


def check(values: Mapping[str, Any], error: type[LocalgradError] = RecipeError) -> None:
    """Refuse what doesn't go together: all rules on two of the arguments whose values are given, by name.

    Raises:
        LocalgradError: of the class that is given, for the first rule that is broken.
    """
    for rule in RULES:
        is_known = rule.first.key in values and rule.second.key in values
        if is_known and rule.first.holds(values) and rule.second.holds(values):
            raise error(rule.said(values))


def as_markdown() -> Iterator[str]:
    """The table for the docs, line by line, with arguments as Python names them."""
    yield from ("| given | doesn't go with | because |", "|---|---|---|")
    for rule in RULES:
        yield f"| {rule.first.shown} | {rule.second.shown} | {rule.reason} |"
