"""``LocalTask``: local modules as a task of timm, for timm's own ``train.py`` and loops like it.

timm's loop calls ``task(input, target)``, then one ``backward()`` on the loss that it returns, and the optimizer's
``step``. A task of local modules has trained by the time its ``forward`` returns: each module has run forward and
backward and been updated. Its loss is the model's task loss, hung on a scalar of its own that takes the gradient of
``backward()`` and is dropped. ``step`` of ``learner.optimizer`` has nothing left to do; timm's schedulers change its
groups, and ``CheckpointSaver`` saves its state, the model's and the task's.

Of the loop nothing else has to change. What it would do to gradients that aren't there is refused: clipping, a loss
scale of its own, several batches to an update, several processes. Source: ``train.py``, ``timm/task`` of timm 1.0.31.
"""

from __future__ import annotations

from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from localgrad.backbones.namespaces import Attributes
from localgrad.errors import CheckpointError, RecipeError, arg, reason_of
from localgrad.integrations.remaining import load_remaining_state, remaining_state
from localgrad.learner import LocalLearner

try:
    from timm.task import TrainingTask, resume_task_checkpoint  # noqa: F401  # the latter came with what is used here
except ImportError as error:
    raise ImportError(
        f"localgrad.integrations.timm_task needs timm 1.0.27 or later ({reason_of(error)}): pip install -U timm."
    ) from error


@final
class LocalTask(TrainingTask):  # type: ignore[misc]  # its types aren't read
    """A task whose forward pass trains all local modules of a learner on one batch.

    The model is ``trainable_module``; ``setup_ema``, evaluation and checkpoints are timm's own. What those lack of the
    learner (auxiliary nets, loss scales, the count of steps) is the task's state.

    Args:
        learner: with optimizers; give ``learner.optimizer`` to the loop.
        verbose: as of any task of timm.
    """

    def __init__(self, learner: LocalLearner, *, verbose: bool = True) -> None:
        super().__init__(device=learner.device, dtype=learner.backbone.dtype, verbose=verbose)
        self.learner = learner
        self.trainable_module = learner.model

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            input: images [B, C, H, W].
            target: class indices int64 [B], or soft targets [B, num_classes], as of timm's Mixup.

        Returns:
            ``loss``, the model's task loss, whose backward pass does nothing; ``output``, its logits [B, num_classes];
            and each module's own loss, ``loss/module_0``.

        Raises:
            RecipeError: the loop takes several batches to an update; and what ``LocalLearner.step`` raises.
        """
        if self.learner.optimizer.num_updates:
            raise RecipeError(
                "task: it was called twice before one optimizer.step, and each call is an update of its own; give the "
                "loop batches of that size (leave out its grad-accum-steps), and cut them: LocalLearner(..., "
                "accumulation=2)."
            )
        result = self.learner.step(input, target)
        loss = result.terms[-1]["task"]
        found = {"loss": loss + torch.zeros_like(loss, requires_grad=True)}
        if result.logits is not None:
            found["output"] = result.logits
        return found | {f"loss/module_{index}": loss for index, loss in enumerate(result.losses)}

    def get_clip_parameters(self, exclude_head: bool = False) -> NoReturn:  # noqa: FBT001, FBT002  # timm's own signature
        """Refused: there are no gradients left to clip. A loss scale of timm asks for them whether it clips or not.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "clip_grad: each local module clips its own gradient and scales its own loss; leave the loop's clip-grad "
            "out, and its amp in float16, and say it when the learner is made: LocalLearner(..., clip_grad=1.0, "
            "precision='fp16')."
        )

    def prepare_distributed(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: what averages gradients is another learner.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "distributed: LocalTask trains in one process; start one, or train in a loop of your own with "
            "localgrad.ParallelLearner."
        )

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the whole model is never run in training.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"torchcompile: the model's blocks are called one by one; leave the loop's torchcompile out, and "
            f"compile local modules: LocalLearner(..., {arg('compile', value=True)})."
        )

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> Attributes:  # noqa: FBT001, FBT002
        """What the learner keeps beside the model and its optimizers."""
        return {} if ema else remaining_state(self.learner)

    def load_task_state(
        self,
        state: Attributes | None,
        strict: bool = True,  # noqa: FBT001, FBT002  # timm's own signature
        module: nn.Module | None = None,
        ema: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Take up what ``get_task_state`` gave.

        Raises:
            CheckpointError: there is none, or it is of other local modules.
        """
        if ema:
            return
        if not state:
            raise CheckpointError(
                "checkpoint: it has no task_state, which holds what local modules need to go on; begin anew from its "
                "weights: timm.create_model(..., checkpoint_path=...)."
            )
        load_remaining_state(self.learner, state)
