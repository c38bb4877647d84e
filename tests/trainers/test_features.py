"""What users switch on in their `TrainingArguments`, with each trainer, on two tasks (docs/support.md)."""

import pytest
import torch
from transformers import EarlyStoppingCallback

from ..support.architectures import ARCHITECTURES
from ..support.contract import keep_contract, trainer_class, trainer_options
from ..support.tables import TABLES, WORKS, outcome, report

MODELS = {"Trainer": "BERT", "Seq2SeqTrainer": "T5", "SFTTrainer": "Llama, SFT"}
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "max_steps": 4,
}
ARGUMENTS = {
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "load_best_model_at_end": BEST,
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "data loader workers": {"dataloader_num_workers": 1},
    "bf16_full_eval": {"bf16_full_eval": True},
}


def run(record_property, trainer: str, feature: str, keep) -> str:
    result = outcome(keep)
    report(record_property, TABLES["features"], feature, trainer, result)
    return result


def with_decoder_inputs(defaults: dict) -> dict:
    """For a loss that is not T5's own: the model gets no labels then, from which it would make its inputs."""
    shift = defaults["model"].prepare_decoder_input_ids_from_labels

    def collate(rows):
        batch = ARCHITECTURES["T5"].collate(rows)
        return batch | {"decoder_input_ids": shift(labels=batch["labels"])}

    return {"data_collator": collate}


@pytest.mark.parametrize(
    "trainer", ["Trainer", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "Trainer")]
)
@pytest.mark.parametrize("feature", ARGUMENTS)
def test_arguments(tmp_path, record_property, feature, trainer):
    def fitting(defaults):
        if feature == "load_best_model_at_end":
            return {"eval_dataset": defaults["train_dataset"]}
        if feature == "label smoothing" and trainer == "Seq2SeqTrainer":
            return with_decoder_inputs(defaults)
        return {}

    result = run(
        record_property,
        trainer,
        feature,
        lambda: keep_contract(MODELS[trainer], "float32", tmp_path, options=fitting, **ARGUMENTS[feature]),
    )
    assert (result == WORKS) is (feature != "bf16_full_eval")


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits if hasattr(outputs, "logits") else outputs["logits"]
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum", ignore_index=-100
    )
    return losses / num_items_in_batch


@pytest.mark.parametrize("trainer", MODELS)
def test_compute_loss_func(tmp_path, record_property, trainer):
    calls = []

    def loss(*args, **kwargs):
        calls.append(kwargs)
        return cross_entropy(*args, **kwargs)

    def with_loss(defaults):
        inputs = with_decoder_inputs(defaults) if trainer == "Seq2SeqTrainer" else {}
        return inputs | {"compute_loss_func": loss}

    keep = lambda: keep_contract(MODELS[trainer], "float32", tmp_path, options=with_loss)  # noqa: E731
    assert run(record_property, trainer, "compute_loss_func", keep) == WORKS
    assert len(calls) > 4  # in the snapshots as well


@pytest.mark.parametrize("trainer", MODELS)
def test_early_stopping(tmp_path, record_property, trainer):
    """With a patience that the few steps do not use up; stopping itself is tested in test_trainer.py."""

    def patient(defaults):
        callback = EarlyStoppingCallback(early_stopping_patience=9)
        return {"eval_dataset": defaults["train_dataset"], "callbacks": [callback]}

    keep = lambda: keep_contract(MODELS[trainer], "float32", tmp_path, options=patient, **BEST)  # noqa: E731
    assert run(record_property, trainer, "early stopping", keep) == WORKS


class LittleMemory:
    """Goes before a trainer class: batches of more than two samples run out of memory."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("trainer", MODELS)
def test_auto_find_batch_size(tmp_path, record_property, trainer):
    """Training, which starts again from the factors of the task, and snapshots."""

    keep = lambda: keep_contract(  # noqa: E731
        MODELS[trainer], "float32", tmp_path, (LittleMemory,), auto_find_batch_size=True, max_steps=3
    )
    assert run(record_property, trainer, "auto_find_batch_size", keep) == WORKS


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_packing(tmp_path, record_property, strategy):
    def packed(defaults):
        defaults["args"].packing, defaults["args"].packing_strategy = True, strategy
        defaults["args"].max_length = 12
        return {}

    keep = lambda: keep_contract("Llama, SFT", "float32", tmp_path, options=packed)  # noqa: E731
    result = outcome(keep)
    assert result == WORKS
    report(record_property, TABLES["packing"], f"packing_strategy={strategy}", "result", result)


def test_compiled_training_is_the_same(tmp_path):
    """Apart from rounding: in entries near zero it is that of the larger ones."""
    deltas = []
    for name, arguments in (("eager", {}), ("compiled", ARGUMENTS["torch_compile"])):
        trainer = keep_contract("Llama", "float32", tmp_path / name, max_steps=4, **arguments)
        deltas.append({n: f.s * f.U @ f.V.T for n, f in trainer.constraint.factors().items()})
    for name, delta in deltas[0].items():
        assert (deltas[1][name] - delta).norm() <= 1e-4 * delta.norm()


@pytest.mark.parametrize("trainer", MODELS)
def test_model_init_is_refused(tmp_path, record_property, trainer):
    architecture = ARCHITECTURES[MODELS[trainer]]

    def construct():
        trainer_class(architecture)(model_init=architecture.make, **trainer_options(architecture, tmp_path))

    assert "model_init" in run(record_property, trainer, "model_init", construct)
