"""What a data set says of the full weights of a model: mean gradients, or moments of its tokens."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_utils import find_executable_batch_size

from ..adapters.layers import AdaptedLayer
from ..adapters.switches import pretrained
from ..config import EBLoRAConfig
from ..memory.accumulators import Storage
from ..memory.curvature import curvature_moments
from ..memory.gradients import choose_indices, mean_gradients, share_batches, snapshot_indices
from ..memory.moments import feature_moments, token_gradient_moments
from ..methods.base import Snapshot, Snapshots
from .observing import ObservingMixin
from .replay import ReplayingMixin

_SHARE_OF_TRAINING = 1 / 32  # that the snapshot before it may have of the samples it will see
_FEWEST_SAMPLES = 8  # of that snapshot
_SAMPLES_OF_BASIS = 4  # times those of a start
_COLLECTORS = {
    "gradients": mean_gradients,
    "token-gradients": token_gradient_moments,
    "features": feature_moments,
}


def take_snapshot(
    model: PeftModel,
    layers: list[AdaptedLayer],
    of: Snapshot,
    *,
    samples: int,
    at_most: int,
    load: Callable[[list[list[int]]], Iterable[Any]],
    loss: Callable[[PeftModel, Any], torch.Tensor],
    config: EBLoRAConfig,
    storage: Storage,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    world_size: int = 1,
    items: Callable[[Any], float] | None = None,
) -> dict[str, Any]:
    """
    Sums up what samples of a data set say of each layer, with the model in evaluation mode.

    Args:
        model (`PeftModel`): The model; it is left in the mode it was in.
        layers (`list[AdaptedLayer]`): Its adapted layers.
        of (`str`): `"gradients"`, the mean gradient of each layer `(d_out, d_in)`; `"token-gradients"` or
            `"features"`, the second moment `(d_in, d_in)` of its tokens' gradients or inputs; `"curvature"`, the
            former as [`CurvatureMoments`] of both sides.
        samples (`int`): Size of the data set.
        at_most (`int`): How many of them are used if `config.snapshot_fraction` names no share.
        load (`Callable`): Yields the inputs of each of the given batches of indices, on the model's device.
        loss (`Callable`): Maps model and inputs to the scalar mean loss of the batch.
        config ([`EBLoRAConfig`]): The options that begin with `snapshot`.
        storage ([`Storage`]): Where the sums are kept, and whether they are sketches.
        seed (`int`): Seed of the choice of samples.
        batch_size (`int`): Samples of a batch.
        process_index (`int`, defaults to 0), world_size (`int`, defaults to 1): Which share of the batches is this
            process's.
        items (`Callable`, *optional*): Maps inputs to what that loss is divided by, if it is not their samples.

    Returns:
        `dict[str, torch.Tensor]`: By layer name; with `snapshot_sketch` [`Sketch`] objects.

    Raises:
        ValueError: if there is no sample, or the loss does not reach a layer; the message names it.
    """
    choice = None if config.snapshot_sampling == "even" else seed
    if config.snapshot_fraction is None:
        indices = choose_indices(samples, at_most, choice)
    else:
        indices = snapshot_indices(samples, config.snapshot_fraction, choice)
    shares = share_batches(indices, batch_size, process_index, world_size)
    inputs = zip(load([batch for batch, _ in shares]), (weight for _, weight in shares), strict=True)
    at = pretrained(model) if config.snapshot_at == "pretrained" else contextlib.nullcontext()
    collect = partial(curvature_moments, items=items) if of == "curvature" else _COLLECTORS[of]
    with _without_dropout(model), at:
        return collect(model, layers, inputs, loss, storage)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode, but for activation checkpointing."""
    training = model.training
    model.eval()
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # the module itself, not its children: it checkpoints in training mode alone
            # some drop by themselves then: `nn.functional.dropout(p=self.dropout, training=self.training)`, layers
            own = [(name, value) for name, value in vars(module).items() if "drop" in name and type(value) is float]
            rates += [(module, name, value) for name, value in own]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        model.train(training)


class SnapshotMixin(ObservingMixin, ReplayingMixin):
    """What a `Trainer` needs to take a snapshot of a task through its own collator and loss."""

    _stands_in = False  # optimizer and scheduler are those of a plan
    _starts = False  # the next snapshot is that of a task's start

    def snapshot(self, dataset: Any, seed: int, of: Snapshot | None = "gradients") -> Snapshots:
        """
        What a data set says of the full weights, through the trainer's own collator and loss.

        Args:
            dataset: A map-style data set; `snapshot_fraction` of it is used, or as `snapshot_samples` says.
            seed (`int`): Seed of that choice.
            of (`str`, *optional*): `"gradients"`, the mean gradient of each layer `(d_out, d_in)`;
                `"token-gradients"` or `"features"`, the second moment `(d_in, d_in)` of its tokens' gradients or
                inputs. `None` for nothing.

        Returns:
            `dict[str, torch.Tensor]`: By layer name; with `snapshot_sketch` [`Sketch`] objects.
        """
        if of is None:
            return {}
        loader = self._loader(dataset)
        take = find_executable_batch_size(  # as the parent's training does
            lambda batch_size: take_snapshot(
                self.model,
                self.layers,
                of,
                samples=len(loader.dataset),  # type: ignore[arg-type]
                at_most=self._samples_of_snapshot(),
                load=lambda batches: self._inputs(loader, batches),
                loss=self._snapshot_loss,
                config=self.eblora_config,
                storage=self.storage_of(of),
                seed=seed,
                batch_size=batch_size,
                process_index=self.args.process_index,
                world_size=self.args.world_size,
                items=self.terms_of,  # of this process alone, since others may have no batch
            ),
            starting_batch_size=self._train_batch_size,
            auto_find_batch_size=self.args.auto_find_batch_size,
        )
        logged = copy.deepcopy(vars(self).get("_metrics"))
        try:
            return take()
        except Exception as error:
            error.add_note(
                "This happened while a snapshot of the task was taken, before or after its training: through the "
                "trainer's own collator and loss, in evaluation mode."
            )
            raise
        finally:
            if logged is not None:  # TRL's loss functions keep sums for the log, which a snapshot is no part of
                self._metrics = logged

    def snapshot_of_start(self, dataset: Any, seed: int) -> Snapshots:
        """The snapshot that the method starts a task from."""
        self._starts = True
        try:
            return self.snapshot(dataset, seed, self.method.starts_from)
        finally:
            self._starts = False

    def _samples_of_snapshot(self) -> int:
        """Directions to start from need few samples, a basis some more; neither much next to a short training."""
        samples = self.eblora_config.snapshot_samples
        if not self._starts:
            return _SAMPLES_OF_BASIS * samples
        trained = self.state.max_steps * self.samples_of_step
        return max(min(samples, int(_SHARE_OF_TRAINING * trained)), _FEWEST_SAMPLES)

    def plan_training(self) -> None:
        """
        Sets the state to that of the beginning of the training to come, for the snapshot before it, and makes an
        optimizer and a scheduler like those of training: a loss may depend on the step, the rate, what is trained.
        """
        steps = self.args.max_steps
        if steps <= 0:
            batches = len(self.get_train_dataloader())
            steps_of_epoch = max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
            steps = math.ceil(self.args.num_train_epochs * steps_of_epoch)
        self.state = TrainerState(max_steps=steps, num_train_epochs=math.ceil(self.args.num_train_epochs))
        layerwise = "layerwise" in str(self.args.optim)  # steps inside the backward pass
        self._stands_in = self.optimizer is None and not layerwise and not self.is_fsdp_enabled
        if self._stands_in:
            super().create_optimizer()
            super().create_scheduler(steps, self.optimizer)

    def forget_plan(self) -> None:
        """Takes away the optimizer and the scheduler of [`plan_training`]: training makes its own."""
        if self._stands_in:
            self.optimizer, self.lr_scheduler, self._stands_in = None, None, False

    def _snapshot_loss(self, model: PeftModel, inputs: dict) -> Any:
        # a user's loss function is promised the number of items; models take their own mean without it, which no
        # batch has whose labels are all ignored
        count: Any = self._get_num_items_in_batch([inputs], self.args.device)
        if not self.compute_loss_func:
            count = None if count is None or count > 0 else 1
        # bf16 has the range of float32; under fp16 gradients would need a loss scale, so they are taken in float32
        bf16 = self.accelerator.mixed_precision == "bf16"
        with self.heads.learning(), self.accelerator.autocast() if bf16 else contextlib.nullcontext():
            return self.compute_loss(model, inputs, num_items_in_batch=count)

    def _loader(self, dataset: Any) -> DataLoader:
        """The loader that training would use for a data set, whoever has overridden `get_train_dataloader`."""
        before, self.train_dataset = self.train_dataset, dataset
        try:
            with self.without_replay():
                return self.get_train_dataloader()
        finally:
            self.train_dataset = before

    def _inputs(self, loader: DataLoader, batches: list[list[int]]) -> Iterator[dict]:
        """The given batches of a loader's rows, through its collator; accelerate would deal them out again."""
        again: DataLoader = DataLoader(
            loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, num_workers=loader.num_workers
        )
        return map(self._prepare_inputs, again)
