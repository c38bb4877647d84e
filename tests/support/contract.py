"""The contract that every supported combination of model, trainer, precision and launcher keeps."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers

from eblora_hf import ContinualEBLoRASeq2SeqTrainer, ContinualEBLoRATrainer, PublishedSequence
from eblora_hf.adapters.layers import keep_differentiable

from ..launch.fp16 import FP16OnCPU
from .architectures import ARCHITECTURES, VOCABULARY, Architecture
from .tiny import make_arguments

FP16 = "fp16 with scaler"
PRECISIONS = ["float32", "bf16 autocast", FP16, "bf16 weights", "8-bit base", "4-bit base"]
AUTOCAST = {"bf16 autocast": {"bf16": True}, FP16: {"fp16": True}}  # by precision, of TrainingArguments
STEPS = 2


def load(architecture: Architecture, precision: str, folder: Path) -> torch.nn.Module:
    """The tiny model in a precision; quantized from a checkpoint in a folder."""
    if precision == "bf16 weights":
        return architecture.make(torch.bfloat16)
    if not precision.endswith("base"):
        return architecture.make()
    if not (folder / "config.json").is_file():
        architecture.make().save_pretrained(folder)  # in a distributed run the first process alone does it
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    options = {"load_in_8bit": True} if precision == "8-bit base" else {"load_in_4bit": True}
    config = transformers.BitsAndBytesConfig(
        **options,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=architecture.heads() or None,
    )
    return architecture.model.from_pretrained(folder, quantization_config=config)


def trainer_class(architecture: Architecture, before: tuple[type, ...] = ()) -> type:
    """The continual trainer of an architecture, with classes before it."""
    if architecture.trainer == "SFTTrainer":
        from eblora_hf import ContinualEBLoRASFTTrainer as Continual
    else:
        Continual = {"Trainer": ContinualEBLoRATrainer, "Seq2SeqTrainer": ContinualEBLoRASeq2SeqTrainer}[
            architecture.trainer
        ]
    return type("Tested", (*before, Continual), {}) if before else Continual


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word a token."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, VOCABULARY))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def trainer_options(architecture: Architecture, folder: Path, **arguments) -> dict[str, Any]:
    """Arguments, data and what else a trainer of the kind needs."""
    arguments = {"max_steps": STEPS, **arguments}
    data = {name: architecture.data(seed) for seed, name in enumerate(("one", "two"))}
    args = make_arguments(folder / "out", **arguments)
    if architecture.trainer == "SFTTrainer":
        from trl import SFTConfig

        texts = {name: [" ".join(f"w{i}" for i in row["input_ids"]) for row in rows] for name, rows in data.items()}
        data = {name: Dataset.from_dict({"text": rows}) for name, rows in texts.items()}
        kept = make_arguments(folder / "out", **arguments).to_dict()
        return {"args": SFTConfig(**kept), "train_dataset": data, "processing_class": tokenizer()}
    options = {"args": args, "train_dataset": data, "data_collator": architecture.collate}
    if architecture.trainer == "Seq2SeqTrainer":
        kept = args.to_dict() | {"predict_with_generate": True, "generation_max_length": 6}
        options["args"] = transformers.Seq2SeqTrainingArguments(**kept)
        options["eval_dataset"] = data
        options["compute_metrics"] = lambda prediction: {
            "accuracy": float((prediction.predictions[:, 1:2] == prediction.label_ids[:, :1]).mean())
        }
    return options


def outputs(architecture: Architecture, model: torch.nn.Module) -> torch.Tensor:
    keep_differentiable(model)
    with torch.no_grad():
        result = model.eval()(**architecture.batch())
    return result.logits_per_image if "logits_per_image" in result else result.logits


def keep_contract(
    name: str,
    precision: str,
    folder: Path,
    before: tuple[type, ...] = (),
    options: Callable[[dict], dict] = lambda defaults: {},
    **arguments,
) -> Any:
    """
    Two tasks are learnt on the manifold and outside the bases, and stock PEFT loads what they were published as.

    Args:
        name (`str`), precision (`str`): What is trained.
        folder (`Path`): Where.
        before (`tuple[type]`): Classes before that of the trainer.
        options (`Callable`): Further arguments of the trainer, from those it has.
        arguments: Of `TrainingArguments`.
    """
    architecture = ARCHITECTURES[name]
    before = (*before, FP16OnCPU) if precision == FP16 else before
    defaults = trainer_options(architecture, folder, **AUTOCAST.get(precision, {}), **arguments)
    defaults |= {"model": load(architecture, precision, folder / "base"), "peft_config": architecture.peft_config()}
    trainer = trainer_class(architecture, before)(**defaults | options(defaults))
    assert trainer.train().global_step == 2 * defaults["args"].max_steps
    orthonormality, restriction = trainer.constraint.deviation()
    assert orthonormality <= 2e-6
    assert restriction <= 2e-7
    published = PublishedSequence.open(folder / "out")
    assert published.names == ["one", "two"]
    assert all(basis.shape[1] > 0 for basis in published.bases().values())
    found = outputs(architecture, trainer.model)  # in low precision from a model that FSDP2 casts
    stock = PeftModel.from_pretrained(load(architecture, precision, folder / "base"), folder / "out")
    expected = outputs(architecture, stock)
    rounded = expected.dtype != found.dtype or found.dtype != torch.float32
    rounded |= architecture.trainer == "SFTTrainer" and precision.endswith("base")
    tolerance = 3e-2 if rounded else 1e-5  # SFTTrainer trains adapters on quantized bases in bf16
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    without = outputs(architecture, load(architecture, precision, folder / "base"))
    assert not torch.allclose(expected, without, atol=1e-6)  # the tasks have done something
    return trainer
