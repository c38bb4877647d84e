"""TRL's trainers that prepare their data in the constructor: DPO, Reward, KTO, one task or several."""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, KTOConfig, KTOTrainer, RewardConfig, SFTConfig

from eblora_hf import (
    ContinualEBLoRADPOTrainer,
    ContinualEBLoRARewardTrainer,
    ContinualEBLoRASFTTrainer,
    ContinualMixin,
    PublishedSequence,
    load_sequence,
)

from ..support.tiny import lora, make_arguments, make_model, make_text_data

WORDS = ["[PAD]", "[UNK]", "[EOS]", *["say", "yes", "or", "no", "please", "maybe", "never"]]


@pytest.fixture(scope="module")
def tokenizer():
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def pairs(chosen, rejected, prompt="say yes or no "):
    return Dataset.from_dict({"prompt": [prompt] * 8, "chosen": [chosen] * 8, "rejected": [rejected] * 8})


PAIRS = {"one": pairs("yes please", "no"), "two": pairs("maybe", "never")}


def arguments(kind, folder, **options):
    defaults = {"max_steps": 3, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    quiet = {"disable_tqdm": True, "logging_strategy": "no"}
    return kind(output_dir=str(folder), **(defaults | quiet | options))


def dpo(folder, tokenizer, dtype=torch.float32, **options):
    return ContinualEBLoRADPOTrainer(
        model=options.pop("model", None) or make_model("llama", dtype=dtype),
        args=arguments(DPOConfig, folder, **options.pop("args", {})),
        train_dataset=options.pop("train_dataset", PAIRS),
        processing_class=tokenizer,
        **({"peft_config": lora(task_type="CAUSAL_LM")} | options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_of_a_task_is_the_model_before_it(tmp_path, tokenizer, dtype):
    """At its first step policy and reference are one model, so that every reward is zero; and so it is later on."""
    found = {}
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad(), model.disable_adapter():
                found[args.output_dir.rpartition("/")[2]] = model.eval()(**inputs).logits

    trainer = dpo(tmp_path, tokenizer, dtype, callbacks=[Look()], eval_dataset=PAIRS)
    trainer.train()
    assert not [name for name in trainer.model.peft_config if name == "ref"]
    with torch.no_grad():
        base = make_model("llama", dtype=dtype).eval()
        torch.testing.assert_close(found["one"], base(**inputs).logits, atol=0, rtol=0)
        after_one = load_sequence(base, tmp_path, upto="one")(**inputs).logits
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(found["two"], after_one, **exact)
    assert PublishedSequence.open(tmp_path).training()[-1]["metric"] == "rewards/accuracies"
    assert np.isfinite(trainer.accuracy_matrix).all()


def test_instruction_then_preferences_then_instruction_is_one_sequence(tmp_path, tokenizer):
    def sft(task, words, **options):
        ContinualEBLoRASFTTrainer(
            model=make_model("llama"),
            args=arguments(SFTConfig, tmp_path),
            train_dataset={task: Dataset.from_dict({"text": [f"say {words}"] * 8})},
            processing_class=tokenizer,
            **options,
        ).train()

    sft("first", "yes please", peft_config=lora(task_type="CAUSAL_LM"))
    dpo(tmp_path, tokenizer, sequence=tmp_path, peft_config=None).train()
    sft("last", "never", sequence=tmp_path)
    assert PublishedSequence.open(tmp_path).names == ["first", "one", "two", "last"]


def test_rewards(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = make_model("llama").config
    config.num_labels = 1
    trainer = ContinualEBLoRARewardTrainer(
        model=transformers.LlamaForSequenceClassification(config),
        args=arguments(RewardConfig, tmp_path),
        train_dataset={name: data.remove_columns("prompt") for name, data in PAIRS.items()},
        eval_dataset={name: data.remove_columns("prompt") for name, data in PAIRS.items()},
        processing_class=tokenizer,
        peft_config=lora(task_type="SEQ_CLS"),
    )
    trainer.train()
    assert PublishedSequence.open(tmp_path).training()[-1]["metric"] == "accuracy"
    assert np.isfinite(trainer.accuracy_matrix).all()


def test_any_trainer_with_a_method_that_prepares(tmp_path, tokenizer):
    class ContinualKTOTrainer(ContinualMixin, KTOTrainer):
        pass

    def judged(good, bad):
        rows = {"prompt": ["say yes or no "] * 8, "completion": [good, bad] * 4, "label": [True, False] * 4}
        return Dataset.from_dict(rows)

    ContinualKTOTrainer(
        model=make_model("llama"),
        args=arguments(KTOConfig, tmp_path, per_device_train_batch_size=4),
        train_dataset={"one": judged("yes", "no"), "two": judged("maybe", "never")},
        processing_class=tokenizer,
        peft_config=lora(task_type="CAUSAL_LM"),
    ).train()
    assert PublishedSequence.open(tmp_path).names == ["one", "two"]


class Halving(Trainer):
    """A trainer whose constructor prepares its data by itself."""

    def __init__(self, *args, train_dataset=None, **kwargs):
        super().__init__(*args, train_dataset=train_dataset.select(range(len(train_dataset) // 2)), **kwargs)


class ContinualHalving(ContinualMixin, Halving):
    pass


def test_what_a_constructor_does_to_its_data_is_kept_or_refused(tmp_path):
    def make(tasks):
        return ContinualHalving(
            model=make_model("bert"),
            args=make_arguments(tmp_path / "out"),
            peft_config=lora(exclude_modules=["classifier"]),
            train_dataset={name: make_text_data("bert") for name in tasks},
        )

    with pytest.raises(ValueError, match=r"not by a method `_prepare_dataset\(dataset, \.\.\.\)`.*for two"):
        make(["one", "two"])
    assert len(make(["one"]).tasks.tasks[0].train_dataset) == 12


@pytest.mark.parametrize("options", [{"train_dataset": PAIRS}, {"train_dataset": PAIRS["one"], "sequence": "x"}])
def test_a_reference_that_would_be_another_model_is_refused(tmp_path, tokenizer, options):
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True is not supported"):
        dpo(tmp_path, tokenizer, args={"precompute_ref_log_probs": True}, **options)
