"""One local module's whole step: forward, loss, backward, clip, update, and its gradients freed.

Everything that a step may keep between batches is the module's own: its optimizer, its gradient scaler, its
clipping norm. So modules can run in any order or place with the same result.

With accumulation the batch is cut into parts, each runs forward and backward, then one update follows. The gradients
are still freed before the next module runs; only the features of the whole batch are kept at the boundary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, TypedDict, cast, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localgrad.backbones.effects import plain_norms, still_statistics
from localgrad.backbones.namespaces import Attributes, Kwargs
from localgrad.backbones.random_numbers import RandomState
from localgrad.backbones.state import Before, Undo
from localgrad.errors import DeviceError, RecipeError, arg, reason_of
from localgrad.objectives.carried import LocalBatch
from localgrad.step.checks import same_device
from localgrad.step.frozen import Frozen
from localgrad.step.local_module import LocalModule, LocalOutput

if TYPE_CHECKING:
    import torch.distributed as dist

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast dtype by the name that recipes use."""
TakeFeatures = Callable[[Tensor], None]
Pass = Callable[[Tensor, LocalBatch, TakeFeatures | None], LocalOutput]
"""One way to take a batch, or a part of it, through a module: ``(inputs, batch, hand_on)``."""
Region = Callable[[], contextlib.AbstractContextManager[None]]
RELATIVE_STEP = {"fp32": 0.003, "bf16": 0.02, "fp16": 0.01}
"""Length of the step of a finite difference, as a share of the length of what it is taken at: above the rounding of
features in that precision."""


class StepSettings(TypedDict):
    """How every module of a learner is stepped; arguments of ``LocalStep``."""

    precision: str
    clip_grad: float | None
    accumulation: int
    compile: bool


@final
class LocalStep:
    """Trains one local module on one batch at a time.

    Args:
        module: the local module.
        parameters: its parameters, in the order that the clipping norm sums them.
        optimizer: over those parameters.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast; the latter with this module's own gradient scaler.
        clip_grad: largest norm of the module's gradient, or ``None``.
        accumulation: parts that a batch is cut into.
        compile: run the module through ``torch.compile``.
        device: where it runs; by default where its parameters are (offloaded ones are on the host in between).
        twins: the processes that train the same module on other images, and average their gradients with this one.
        around: makes a region for a forward and backward pass, in which the module has all its weights.
    """

    def __init__(
        self,
        module: LocalModule,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "fp32",
        clip_grad: float | None = None,
        accumulation: int = 1,
        compile: bool = False,
        device: torch.device | None = None,
        twins: dist.ProcessGroup | None = None,
        around: Region = contextlib.nullcontext,
    ) -> None:
        self.module = module
        self.layout = module.layout
        self.around = around
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.clip_grad = clip_grad
        self.accumulation = accumulation
        self.device = device or self.parameters[0].device
        self.device_type = self.device.type
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "fp16")
        self.updating = False  # whether weights may have been changed in part
        self.num_updates = 0
        self.gradient_norm: Tensor | None = None  # of the last update, before clipping; none where nothing clips
        self.frozen = False  # whether the module only runs, and learns no more
        self._undo = Undo(module)
        self._norms = plain_norms([module])
        self.as_frozen = Frozen(module)
        # Of what is drawn at random in a step; by default the caller's own numbers are.
        self.seed: tuple[int, ...] | None = None
        read = set(map(id, module.reads))
        self._all = [weight for weight in module.parameters() if id(weight) not in read]
        self._learning = [weight.requires_grad for weight in self._all]
        self._held = held_by(optimizer)
        self._stays = self._all[0].device == self.device  # offloaded modules come and go
        self._is_compiled = compile
        self._forward: Callable[..., LocalOutput] = compiled_alone(module) if compile else module
        self._replicated: DistributedDataParallel | None = None
        if twins is not None:
            # Running statistics are averaged when someone looks at them: ``ParallelLearner.average_statistics``.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: Kwargs = {
                name: False,
                "find_unused_parameters": module.has_unread,
            }  # the newer name is since PyTorch 2.15, which warns of the older
            self._forward = self._replicated = DistributedDataParallel(module, process_group=twins, **options)

    def __getstate__(self) -> Attributes:
        """For deep copies: compiled code belongs to the module that it was made of."""
        return {**vars(self), "_forward": None if self._is_compiled else self._forward}

    def __setstate__(self, state: Attributes) -> None:
        vars(self).update(state)
        if self._is_compiled:
            self._forward = compiled_alone(self.module)

    def follow_model(self) -> bool:
        """Notice weights that were frozen or unfrozen since the optimizer was made, and what it holds otherwise now.

        Returns:
            Whether the parameters to train are others now.

        Raises:
            RecipeError: blocks aren't what was cut into branches; a weight that requires a gradient is in no optimizer;
                the optimizer was given one of another module; or there is none left.
            DeviceError: the module was moved.
        """
        if self._stays and not same_device(self._all[0].device, self.device):
            raise DeviceError(
                f"model: it is on {self._all[0].device}, and its optimizers were made for {self.device}; move the "
                "model first, then make the learner: LocalLearner(model.to(device), ...)."
            )
        self.module.check_branches()
        learning = [weight.requires_grad for weight in self._all]
        holds = held_by(self.optimizer)
        if learning == self._learning and len(holds) == len(self._held) and all(map(is_, holds, self._held)):
            return False
        held = set(map(id, holds))
        foreign = held - set(map(id, self._all))
        if foreign:
            raise RecipeError(
                f"{type(self.optimizer).__name__} of a local module: {len(foreign)} parameters that aren't the "
                "module's were added to it; add each to the optimizer of its own module, or call "
                "learner.configure_optimizers(...) again."
            )
        known = set(map(id, self._all))
        for name, weight in self.module.named_parameters():
            if weight.requires_grad and id(weight) in known and id(weight) not in held:
                raise RecipeError(
                    f"model: {name} of a local module was unfrozen, or taken out of its optimizer, and none holds it; "
                    "call learner.configure_optimizers(...) again after requires_grad_(True), or add it to the "
                    "module's own in learner.optimizers with add_param_group."
                )
        if not any(learning) and not self.frozen:
            raise RecipeError(
                "model: all parameters of a local module were frozen; unfreeze some, or use fewer modules."
            )
        known = set(map(id, self.parameters))
        self.parameters += [weight for weight in self._all if weight.requires_grad and id(weight) not in known]
        self._learning, self._held = learning, holds
        return True

    def begin(self) -> None:
        """Begin without what another backward pass or an unfinished step has left."""
        for weight in self.parameters:
            if weight.grad is not None:
                weight.grad = None
        self.module.gradient = self.gradient_norm = None
        if self.updating:  # the scaler may think that the optimizer is in the middle of its step
            state = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.precision == "fp16")
            self.scaler.load_state_dict(state)
        self.updating = False

    def __call__(self, inputs: Tensor, batch: LocalBatch, hand_on: TakeFeatures | None = None) -> LocalOutput:
        """Train on one batch, from cleared gradients on; a frozen module only runs (``Frozen``).

        Args:
            inputs: what the module before gave, detached; the images for the first module.
            batch: images and labels.
            hand_on: called with the module's features as soon as all of them are there: before the backward pass
                (of the last part, where the batch is cut into parts).

        Returns:
            The module's output, its graph gone: features for the next module, and the figures.
        """
        with self._training(inputs, batch):
            if self.accumulation == 1:
                return self._pass_for(batch)(inputs, batch, hand_on)
            return self._accumulate(inputs, batch, hand_on)

    def over_parts(
        self, received: Sequence[Tensor], parts: Sequence[LocalBatch], *, features: bool = True, logits: bool = True
    ) -> list[LocalOutput]:
        """Train on one batch that comes in parts, with one update at the end.

        Args:
            received: what the module before gave for each.
            parts: as ``make_parts`` has made them.
            features: whether anyone looks at what it hands on; otherwise there are none.
            logits: likewise.

        Returns:
            The output of each part; losses are its share of the batch's.
        """
        outputs = []
        with self._training(received[0], parts[0]):
            for number, (inputs, part) in enumerate(zip(received, parts, strict=True), 1):
                with self._in_sync(is_last=number == len(parts)):
                    output = self._pass_for(part)(inputs, part, None)
                kept = output.features if features else output.features.new_empty(0)
                outputs.append(output._replace(features=kept, logits=output.logits if logits else None))
                del output, kept
        return outputs

    @contextlib.contextmanager
    def _training(self, inputs: Tensor, batch: LocalBatch) -> Iterator[None]:
        """A region for the passes of one batch, from cleared gradients on; the update follows."""
        self.begin()  # whatever became of the last one
        check_surroundings(self.device_type, self.precision, inputs, batch.labels)
        seed = None if self.seed is None else (*self.seed, batch.number)
        told = compilers_errors_told() if self._is_compiled else contextlib.nullcontext()
        single = single_images_refused(len(inputs), self.accumulation)
        with told, drawing_from(self.device, seed), only_read(self.module.reads), single:
            yield
        self.module.end_batch()
        if not self.frozen:
            self._update()

    def _pass_for(self, batch: LocalBatch) -> Pass:
        if self.frozen:
            return self._only_run
        is_drawn = batch.gradient is not None and self.module.objective.reconcile
        return self._reconciled if is_drawn else self._once

    def _in_sync(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """A region for a part's passes: gradients are averaged with twins' in the last part's."""
        if is_last or self._replicated is None:
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self._replicated.no_sync()
        return no_sync

    def _only_run(self, inputs: Tensor, batch: LocalBatch, hand_on: TakeFeatures | None = None) -> LocalOutput:
        with torch.no_grad(), autocast(self.device_type, self.precision), self.as_frozen.running():
            output = self._forward(inputs, batch)
        if hand_on is not None:
            hand_on(output.features)
        return output

    def _once(
        self,
        inputs: Tensor,
        batch: LocalBatch,
        hand_on: TakeFeatures | None = None,
        *,
        weight: Tensor | None = None,
        received: Tensor | None = None,
    ) -> LocalOutput:
        more = () if received is None else (received,)
        with self.around():
            with autocast(self.device_type, self.precision):
                output = self._forward(inputs, batch, *more)
            if not output.loss.requires_grad:
                raise RecipeError(
                    f"term {', '.join(output.terms)}: nothing in the module learns of its loss; compute it of outputs, "
                    "not of what detach() gives, and freeze no module whole (freeze_from does that)."
                )
            if hand_on is not None:
                hand_on(output.features)
            loss = output.loss if weight is None else output.loss * weight
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            del loss
            output = output._replace(loss=output.loss.detach())  # the graph, and what it holds, goes with the region
        gradient, self.module.gradient = self.module.gradient, None
        return output._replace(gradient=gradient)

    def _reconciled(self, inputs: Tensor, batch: LocalBatch, hand_on: TakeFeatures | None = None) -> LocalOutput:
        """As ``_once``, with the pull of successive gradient reconciliation (SGR, arXiv 2406.05222).

        SGR penalises the distance of the gradient g at this module's input from the one at the output of the module
        before, which needs the gradient of a gradient, and fused attention has none. Here the penalty is
        1 - cosine of the two, a mean over images (of a part) that weighs each by the length of its g. Its gradient by
        the parameters is that of g . u, with u the penalty's gradient by g, and so a derivative along u: a central
        difference of two more passes, in which what the objective compares with stays where it was.
        """
        before = RandomState()
        entered = inputs.view_as(inputs).requires_grad_()  # a leaf over the same numbers: they came without a graph
        output = self._once(entered, batch, hand_on, received=inputs)
        after = RandomState()
        assert entered.grad is not None, "the loss depends on the inputs"
        share = 1.0 if batch.share is None else batch.share
        scale = self.scaler.scale(torch.full((), share, device=self.device))  # a tensor: nobody waits for its value
        along = cosine_direction(entered.grad.float() / scale, batch.gradient)
        # Where fp16 overflowed the update is held back; batch norms must not see what isn't finite all the same.
        along = torch.where(along.isfinite().all(), along, 0.0)
        step = RELATIVE_STEP[self.precision] * inputs.float().norm() / along.norm().clamp(min=1e-12)
        weight = self.module.objective.reconcile / (2 * step)
        del entered
        for sign in (1.0, -1.0):
            before.restore()  # the same draws of dropout and drop path
            moved = inputs + (sign * step * along).to(inputs.dtype)
            with still_statistics(self._norms):
                self._once(moved, batch, weight=sign * weight, received=inputs)
            del moved
        after.restore()
        return output

    def _accumulate(self, inputs: Tensor, batch: LocalBatch, hand_on: TakeFeatures | None) -> LocalOutput:
        outputs: list[LocalOutput] = []
        chunks, parts = inputs.chunk(self.accumulation), batch.parts(self.accumulation)

        def hand_on_all(features: Tensor) -> None:
            assert hand_on is not None, "asked for only where someone takes them"
            batch.take_context(parts)
            hand_on(torch.cat([*(output.features for output in outputs), features]))

        for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True), 1):
            is_last = number == len(chunks)
            take = hand_on_all if is_last and hand_on is not None else None
            with self._in_sync(is_last=is_last):
                outputs.append(self._pass_for(part)(chunk, part, take))
        batch.take_context(parts)
        return joined(outputs)

    def snapshot(self) -> Before:
        """What a step changes before its update: random states, and what forward passes write (running statistics)."""
        return self._undo.remember()

    def go_back(self, state: Before) -> None:
        """Undo an unfinished step: gradients are dropped, all else is as in the snapshot.

        Raises:
            RuntimeError: the step wrote a buffer that no step before had written.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._undo.undo(state)

    def run_as(self, accumulation: int) -> None:
        """Cut batches into another number of parts from now on; a compiled module is compiled anew."""
        self.accumulation = accumulation
        if self._is_compiled:
            self._forward = compiled_alone(self.module)

    def _update(self) -> None:
        self.updating = True
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        with explained(self.optimizer):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.module.copies:  # else what is followed may be a copy (see step/copies.py)
            self.module.objective.follow()
        self.num_updates += 1
        self.updating = False


@contextlib.contextmanager
def only_read(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """A region in which weights get no gradient, also where they are read again in a backward pass."""
    learning = [weight for weight in weights if weight.requires_grad]
    for weight in learning:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad = True


def held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimizer updates, group after group."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@contextlib.contextmanager
def explained(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A region for an optimizer's step, whose own complaint about what it lacks becomes one line.

    Raises:
        RecipeError: naming the optimizer.
    """
    try:
        yield
    except (TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "an assertion"
        raise RecipeError(
            f"the step of {type(optimizer).__name__} failed ({reason}); if it needs a closure or "
            "more than gradients, take AdamW, SGD, Lion or LAMB."
        ) from error


@contextlib.contextmanager
def drawing_from(device: torch.device, seed: tuple[int, ...] | None) -> Iterator[None]:
    """A region in which a device's random numbers are a function of a seed alone; the caller's own go on afterwards.

    So what a module draws depends neither on the modules before it nor on the process that it runs in. With ``None``
    the caller's numbers are drawn.
    """
    if seed is None:
        yield
        return
    number = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), "big") >> 1
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(number)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(number)
        yield


def check_surroundings(device_type: str, precision: str, *given: Tensor) -> None:
    """Refuse to train where PyTorch was told not to, or in another precision than the learner's.

    Raises:
        RecipeError: naming what is on around the step.
    """
    if not torch.is_grad_enabled():
        raise RecipeError(
            "step: it was called under torch.no_grad() or torch.inference_mode(), where nothing trains; call it "
            "outside."
        )
    if any(tensor.is_inference() for tensor in given):
        raise RecipeError(
            "step: images or labels were made under torch.inference_mode(), and can't be trained on; make them "
            "outside, or pass images.clone() and labels.clone()."
        )
    if torch.is_autocast_enabled(device_type):
        around = torch.get_autocast_dtype(device_type)
        if around != PRECISIONS[precision]:
            raise RecipeError(
                f"step: it was called under torch.autocast in {around}, and this learner has precision={precision!r}; "
                "call it outside, and say the precision when the learner is made."
            )


@contextlib.contextmanager
def single_images_refused(num_images: int, accumulation: int) -> Iterator[None]:
    """Say in words what PyTorch says of a batch norm that gets a single value for each channel.

    Raises:
        RecipeError: inside, naming how many parts would do.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        if accumulation == 1:
            raise RecipeError(
                f"images: a batch of {num_images} leaves a batch norm of the model one value for each channel, and no "
                "variance; take larger batches, and leave a small last one out (drop_last=True)."
            ) from error
        fitting = next((n for n in range(accumulation, 0, -1) if _smallest_part(num_images, n) > 1), None)
        instead = "larger batches" if fitting is None else f"accumulation={fitting}, or larger batches"
        raise RecipeError(
            f"{arg('accumulation')}: {accumulation} parts of {num_images} images leave a batch norm one value for "
            f"each channel, and no variance; take {instead}."
        ) from error


def _smallest_part(num_images: int, count: int) -> int:
    """Images in the last part of a batch, as ``Tensor.chunk`` cuts."""
    size = -(-num_images // count)
    return (num_images - 1) % size + 1


def compiled_alone(module: nn.Module) -> Callable[..., Any]:
    """A module's forward pass through ``torch.compile``, with a code object of its own.

    torch keeps compiled variants by code object. All local modules share ``LocalModule.forward``, so they would be
    variants of one function: compiled for symbolic shapes from the second on, and not at all after the eighth. Of a
    model that is compiled with several memory budgets, the second would be given the first one's code.
    """
    forward = type(module).forward
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    compiled: Callable[..., Any] = torch.compile(types.MethodType(own, module), dynamic=False)
    return compiled


@contextlib.contextmanager
def compilers_errors_told() -> Iterator[None]:
    """A region in which what torch's compiler can't do here is told of the option that asked for it.

    Raises:
        DeviceError: naming the compiler's reason.
    """
    try:
        yield
    except RuntimeError as error:
        kinds = [kind.__module__ for kind in type(error).__mro__]
        if not any(kind.startswith(("torch._dynamo", "torch._inductor")) for kind in kinds):
            raise
        reason = reason_of(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]  # which is for torch's own developers
        raise DeviceError(
            f"{arg('compile', value=True)}: torch can't compile this on this machine ({reason}); leave "
            f"{arg('compile')} out."
        ) from error


def joined(outputs: Sequence[LocalOutput]) -> LocalOutput:
    """The output of a batch, made of those of its parts, whose losses are their shares of the batch's."""
    logits = [output.logits for output in outputs if output.logits is not None]
    gradients = [output.gradient for output in outputs if output.gradient is not None]
    return LocalOutput(
        features=torch.cat([output.features for output in outputs]),
        loss=torch.stack([output.loss for output in outputs]).sum(),
        terms={name: torch.stack([output.terms[name] for output in outputs]).sum() for name in outputs[0].terms},
        logits=torch.cat(logits) if logits else None,
        gradient=torch.cat(gradients) if gradients else None,
    )


def cosine_direction(own: Tensor, wanted: Tensor) -> Tensor:
    """The gradient of ``sum over images of w (1 - cosine(own, wanted))`` by ``own``; both [B, ...].

    Images weigh by the lengths of their own gradients, ``w = |own| / sum of |own|``, taken as constants. With equal
    weights the direction would be longest where the gradient is shortest: for images that have nothing more to teach.
    """
    g, d = own.flatten(1).float(), wanted.flatten(1).float()
    g_norm, d_norm = g.norm(dim=1, keepdim=True).clamp(min=1e-12), d.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosine = (g * d).sum(dim=1, keepdim=True) / (g_norm * d_norm)
    along: Tensor = (cosine * g / g_norm - d / d_norm) / g_norm.sum()
    return along.view_as(own).to(own.dtype)


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager[None]:
    """The autocast region of a precision on a type of device; nothing for fp32."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return cast(contextlib.AbstractContextManager[None], torch.autocast(device_type, dtype=dtype))


def check_precision(precision: str, device: torch.device, weights: torch.dtype = torch.float32) -> None:
    """Refuse a precision that is unknown, that the device doesn't have, or that isn't one for weights of that type.

    Weights in bfloat16 or float64 are trained as they are. Those in float16 aren't: most updates are smaller than what
    they can hold, and PyTorch's gradient scaler doesn't take their gradients.

    Raises:
        DeviceError: naming what to type instead.
    """
    if precision not in PRECISIONS:
        raise DeviceError(f"{arg('precision')}: unknown {precision!r}; take one of {', '.join(PRECISIONS)}.")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DeviceError(f"{arg('precision')}: {device} has no bf16; take {arg('precision', 'fp16')} or fp32.")
    if weights == torch.float16:
        raise DeviceError(
            f"{arg('precision')}: the model's weights are float16, in which updates get lost; call model.float() and "
            f"take {arg('precision', 'fp16')}, or call model.bfloat16()."
        )
    if PRECISIONS[precision] not in (None, weights) and weights != torch.float32:
        raise DeviceError(
            f"{arg('precision')}: {precision!r} is for weights in float32, and the model's are {weights}; take "
            f"{arg('precision', 'fp32')}, which leaves them as they are, or call model.float()."
        )
