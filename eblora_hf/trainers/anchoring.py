"""Holds a model to what it answered before: each training step has a further pass over a few rows of an anchor."""

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from ..adapters.heads import has_fresh_head, pretrained_part
from ..adapters.switches import before_task
from ..memory.anchor import Answers, Distribution, Features, positions_of, share_variance
from ..memory.noise import random_inputs
from ..published.schema import AnchorRows
from ..tasks import Task
from .measuring import MeasuringMixin
from .preparing import PreparingMixin
from .snapshots import SnapshotMixin

logger = logging.get_logger(__name__)

_MOST_ROWS = 1024  # of a data set, evenly spaced; a few dozen do
_RANDOM_ROWS = 256


@dataclasses.dataclass
class _Part:
    """Rows that go through the model together: a share of those of a step, and what was answered to them."""

    inputs: dict[str, Any]
    mask: torch.Tensor | None
    share: float
    pretrained: Answers | None = None
    before_task: Answers | None = None


def check_anchor(anchor: Any, args: TrainingArguments | None) -> None:
    """Raises a `ValueError` for what cannot be an anchor, before anything is built."""
    if anchor is None or (isinstance(anchor, str) and anchor == "random"):
        pass
    elif isinstance(anchor, str | Mapping) or not hasattr(anchor, "__getitem__") or not hasattr(anchor, "__len__"):
        raise ValueError(
            f"`anchor` must be a data set with a length, whose rows the trainer's collator takes, or 'random', got "
            f"{anchor!r:.100}."
        )
    elif not len(anchor):
        raise ValueError("`anchor` is empty: pass a few dozen rows like those that the model was pre-trained on.")
    if anchor is not None and args is not None and any(kind in str(args.optim) for kind in ("layerwise", "lomo")):
        raise ValueError(
            f"`anchor` with optim={args.optim!r} is not supported: it steps within the backward pass, of which there "
            "are two. Choose another optimizer."
        )


class AnchoringMixin(PreparingMixin, MeasuringMixin, SnapshotMixin):
    """
    Overrides the training step, which first pulls the answers to some rows of an anchor back to what they were, and
    the log, which says how far they have gone.

    Attributes:
        anchor (*optional*): A data set prepared as the trainer prepares its own, or `"random"`.
    """

    anchor: Any = None
    _anchor_steps: list[list[_Part]]  # the rows of one step after another, and then from the first again
    _anchor_rows: AnchorRows | None = None  # what the record of a task says of the anchor
    _trunk: torch.nn.Module | None = None  # whose outputs are held, if the model's answers mean nothing
    _loss_of_anchor: torch.Tensor | None = None  # summed up since the last entry of the log
    _pulls = 0  # since then

    @property
    def anchored(self) -> bool:
        """Whether training steps are held by an anchor."""
        return self.anchor is not None and self.eblora_config.anchor_weight > 0.0

    def prepare_anchor(self, anchor: Any) -> None:
        """Takes what `anchor=` was given. Raises a `ValueError` if the model cannot be held by one."""
        self.anchor, self._anchor_rows = anchor, None
        if not self.anchored:
            return
        config = getattr(self.model.get_base_model(), "config", None)
        problem = getattr(config, "problem_type", None)
        labels = getattr(config, "num_labels", None)
        single = labels == 1 and type(self.model.get_base_model()).__name__.endswith("Classification")
        if not self._holds_features and (single or problem in ("regression", "multi_label_classification")):
            raise ValueError(
                f"`anchor` holds the shares of classes that exclude each other, but the model has num_labels={labels} "
                f"and problem_type={problem!r}. Leave out `anchor`."
            )
        if self._holds_features and self._pretrained_part() is None:
            kind = type(self.model.get_base_model()).__name__
            raise ValueError(
                "`anchor` holds what the pre-trained part of the model gives to a fresh head, but which of "
                f"its parts that is, the `base_model_prefix` of {kind} does not tell. Leave out `anchor`."
            )
        if self.is_fsdp_enabled and self.heads.declared:
            raise ValueError(
                f"`anchor` is not supported under FSDP2 where heads are trained ({', '.join(self.heads.declared)}): "
                "the head before a task is not kept there. Leave it out, or train on several GPUs without FSDP."
            )
        if not isinstance(anchor, str):
            self.anchor = self.prepared_alone(Task("anchor", anchor))

    @property
    def _draws(self) -> bool:
        """Whether the rows hold no data, but are drawn for each task."""
        return isinstance(self.anchor, str)

    @property
    def _holds_features(self) -> bool:
        """Whether there are no answers of before to hold to: the head was drawn at random, or is each task's own."""
        return self.heads.own or has_fresh_head(self.model.get_base_model())

    def _pretrained_part(self) -> torch.nn.Module | None:
        return pretrained_part(self.model.get_base_model(), self.heads.declared)

    # ---- before a task ----

    def begin_anchor(self, task: Task, seed: int) -> None:
        """Has the model before the task, and once in a run the pre-trained one, answer to the rows of the anchor."""
        self._loss_of_anchor, self._pulls = None, 0
        self._trunk = self._pretrained_part() if self._holds_features else None
        is_first = self._anchor_rows is None
        if not self.anchored:
            self._anchor_rows = AnchorRows()
        elif self._draws:
            self._anchor_rows = AnchorRows(kind="random")
            self._read_rows(task.train_dataset, _RANDOM_ROWS, seed)
        elif is_first:
            self._anchor_rows = self._read_rows(self.anchor, _MOST_ROWS, self.args.seed)
        if is_first:
            self._tell_of_other_anchor()
        if self.anchored:
            self._have_answered([part for step in self._anchor_steps for part in step])

    def _read_rows(self, dataset: Any, most: int, seed: int) -> AnchorRows:
        """Collates the rows once and for all, so that what is answered to them stays valid."""
        set_seed(seed)  # of collators that draw
        loader = self._loader(dataset)
        rows = np.arange(len(loader.dataset))  # type: ignore[arg-type]
        if self._draws:
            rows = np.resize(rows, most)
        elif len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        index, processes = self.args.process_index, self.args.world_size
        count = min(self.eblora_config.anchor_samples, len(rows))
        order = np.random.default_rng(seed).permutation(rows)
        steps = np.resize(order, (-(-len(order) // count), count))  # the last one is filled up from the first
        # as many on every process: those of a sharded model answer together
        own = [steps[step % len(steps)] for step in range(index, len(steps) + index, processes)]
        # as few at a time as the training may come down to
        together = 1 if self.args.auto_find_batch_size else self._train_batch_size
        shares = [np.array_split(step, -(-count // together)) for step in own]
        collated = self._collated(loader, [share.tolist() for step in shares for share in step])
        generator = torch.Generator().manual_seed(seed + index) if self._draws else None
        self._anchor_steps = [
            [self._part(next(collated), len(share) / count, generator) for share in step] for step in shares
        ]
        set_seed(seed)  # whatever batches have drawn
        alone = self._collated(loader, [] if self._draws else [[int(row)] for row in rows])
        return AnchorRows(kind="rows", rows=len(rows), sha256=_digest(alone))

    def _have_answered(self, parts: list[_Part]) -> None:
        """Keeps what the pre-trained model, if the rows are data, and the one before the task say to them."""
        if parts[0].pretrained is None and not self._draws:
            with self.pretrained_model():
                for part, answers in zip(parts, self._answers(parts), strict=True):
                    part.pretrained = answers
        if self.begun.sequence.tasks or self._draws:
            with before_task(self.model):
                for part, answers in zip(parts, self._answers(parts), strict=True):
                    part.before_task = answers
        else:  # the model before the first task is the pre-trained one
            for part in parts:
                part.before_task = part.pretrained

    def _answers(self, parts: list[_Part]) -> list[Answers]:
        answers = [self._answer(part) for part in parts]
        features = [answer for answer in answers if isinstance(answer, Features)]
        return [*share_variance(features)] if features else answers

    def _collated(self, loader: DataLoader, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        """Batches of rows as the trainer's collator makes them, on the CPU."""
        again: DataLoader = DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
        try:
            yield from again
        except Exception as error:
            error.add_note("This happened while rows of the `anchor` went through the trainer's collator.")
            raise

    def _part(self, collated: dict[str, Any], share: float, draw: torch.Generator | None) -> _Part:
        """What the model takes of a batch, without labels."""
        base_model = self.model.get_base_model()
        config = getattr(base_model, "config", None)
        labels = next((collated[name] for name in (*self.label_names, "labels") if name in collated), None)
        taken = inspect.signature(base_model.forward).parameters.keys() - {*self.label_names, "labels"}
        inputs = {name: value for name, value in collated.items() if name in taken}
        mask = inputs.get("attention_mask")
        mask = mask.flatten(0, 1) if mask is not None and mask.ndim == 3 else mask  # (B, choices, L)
        if isinstance(labels, torch.Tensor) and labels.is_floating_point() and self._trunk is None:
            raise ValueError(
                "`anchor` holds the shares of classes that exclude each other, but the labels of its rows are no "
                f"classes ({labels.dtype}). Leave out `anchor`."
            )
        if getattr(config, "is_encoder_decoder", False):
            own = inputs.get("decoder_attention_mask")
            mask = mask if own is None and self._trunk is not None else own  # a classifier's decoder reads the same
            if labels is not None and labels.ndim == 2:
                mask = labels != -100
                if "decoder_input_ids" not in inputs and hasattr(base_model, "prepare_decoder_input_ids_from_labels"):
                    inputs["decoder_input_ids"] = base_model.prepare_decoder_input_ids_from_labels(labels=labels)
        if draw is not None:
            text: Any = getattr(config, "get_text_config", lambda: config)()
            inputs = random_inputs(inputs, getattr(text, "vocab_size", None), self._special_tokens(config, text), draw)
        return _Part(inputs, mask, share)

    def _special_tokens(self, *configs: Any) -> set[int]:
        """Tokens that a model looks for: those of its tokenizer, and those that its config names."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        special = set(getattr(tokenizer, "all_special_ids", None) or ())
        for config in configs:
            for name, value in vars(config).items() if config is not None else ():
                if name.endswith(("_token_id", "_token_index")):
                    tokens = value if isinstance(value, list) else [value]
                    special |= {token for token in tokens if token is not None}
        return special

    @torch.no_grad()
    def _answer(self, part: _Part) -> Answers:
        training = self.model.training
        self.model.eval()
        try:
            with self.compute_loss_context_manager():
                outputs = self._held_outputs(self.model, part)
        except Exception as error:
            error.add_note("This happened while the model answered to rows of the `anchor`, without their labels.")
            raise
        finally:
            self.model.train(training)
        if not len(positions_of(outputs, part.mask)):
            raise ValueError(
                "`anchor` has rows without a token that counts: there is nothing to hold. Leave them out."
            )
        if self._trunk is not None:
            return Features.of(outputs, part.mask)
        return Distribution.of(outputs, part.mask, self.eblora_config.anchor_temperature)

    def _held_outputs(self, model: torch.nn.Module, part: _Part) -> torch.Tensor:
        """What is held of the model's outputs: logits, or the last hidden states of its pre-trained part."""
        inputs = self._prepare_inputs(dict(part.inputs))
        if self._trunk is not None:
            given: list[Any] = []
            hook = self._trunk.register_forward_hook(lambda _, args, outputs: given.append(outputs))
            try:
                model(**inputs)
            finally:
                hook.remove()
            hidden = given[-1] if isinstance(given[-1], torch.Tensor) else given[-1][0]
            return hidden.flatten(2).mT if hidden.ndim == 4 else hidden  # (B, C, H, W) of pictures → (B, H·W, C)
        outputs = model(**inputs)
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"`anchor` holds the `logits` of a model, but {type(self.model.get_base_model()).__name__} returns "
                "none for inputs without labels. Leave out `anchor`."
            )
        return logits

    def _tell_of_other_anchor(self) -> None:
        """Logs if the newest task was held by an anchor that this run does not have."""
        records = self.begun.sequence.training()
        before = records[-1].get("anchor") if records else None
        if before and before != self._anchor_rows:
            rows = f"{before['rows']} rows, sha256 {before['sha256'][:12]}…" if "rows" in before else "random inputs"
            own = "another" if self._anchor_rows else "none"
            logger.warning(
                f"The task {self.begun.sequence.names[-1]!r} was learnt with an anchor ({rows}), and this run has "
                f"{own}: what that one held may be lost now. Pass the same `anchor=`."
            )

    def anchor_record(self) -> dict[str, Any]:
        """For the record of a task."""
        return {"anchor": dict(self._anchor_rows)} if self._anchor_rows else {}

    # ---- while it trains ----

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A pass over rows of the anchor, once before each step of the optimizer, and then the task's own."""
        if self.anchored and self.accelerator.sync_gradients:
            model.train()
            if callable(getattr(self.optimizer, "train", None)):  # of optimizers without a schedule
                self.optimizer.train()
            # the pass of the task that follows sums up the gradients of all processes, these among them
            with self.accelerator.no_sync(model):
                for part in self._anchor_steps[self.state.global_step % len(self._anchor_steps)]:
                    self._pull(model, part)
            self._pulls += 1
        return super().training_step(model, *args, **kwargs)

    def _pull(self, model: torch.nn.Module, part: _Part) -> None:
        with self.compute_loss_context_manager():
            outputs = self._held_outputs(model, part)
        held = [answers for answers in (part.pretrained, part.before_task) if answers is not None]
        loss = (
            self.eblora_config.anchor_weight
            * part.share
            * torch.stack([answers.distance(outputs) for answers in held]).sum()
        )
        self.accelerator.backward(loss)
        # on the device: asking for it would wait for it
        self._loss_of_anchor = loss.detach() + (0.0 if self._loss_of_anchor is None else self._loss_of_anchor)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._loss_of_anchor is not None:
            logs["anchor_loss"] = self.accelerator.reduce(self._loss_of_anchor, "mean").item() / self._pulls
            self._loss_of_anchor, self._pulls = None, 0
        super().log(logs, *args, **kwargs)


def _digest(rows: Iterator[dict[str, Any]]) -> str:
    """The sha256 of all tensors of rows, each collated by itself; labels are no part of them."""
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            value = row[name]
            if isinstance(value, torch.Tensor) and "label" not in name:
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
