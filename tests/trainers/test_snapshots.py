"""Snapshots without a trainer: any model, any loader, any loss."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch.utils.data import DataLoader, Dataset

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence
from eblora_hf.adapters.layers import find_layers
from eblora_hf.memory.accumulators import Storage
from eblora_hf.trainers.snapshots import take_snapshot

from ..support.tiny import lora, make_model, make_text_data
from ..support.trainers import make_trainer

DATA = make_text_data("bert", size=12)


def setting(dropout: float = 0.0):
    model = get_peft_model(make_model("bert", dropout=dropout), lora(exclude_modules=["classifier"]))
    return model, find_layers(model, "default")


def take(model, layers, of="gradients", **options):
    defaults = {
        "samples": len(DATA),
        "at_most": len(DATA),
        "storage": Storage(),
        "load": lambda batches: (DATA[batch] for batch in batches),
        "loss": lambda model, inputs: model(**inputs).loss,
        "config": EBLoRAConfig(snapshot_fraction=1.0),
        "seed": 0,
        "batch_size": 4,
    }
    return take_snapshot(model, layers, of, **(defaults | options))


def test_gradients_are_those_of_the_mean_loss_over_all_samples():
    model, layers = setting(dropout=0.5)
    model.train()
    snapshot = take(model, layers)
    assert model.training  # and yet no dropout
    model.eval()
    for layer in layers:
        layer.weight.requires_grad_(True)
    model(**DATA[:]).loss.backward()
    for layer in layers:
        torch.testing.assert_close(snapshot[layer.name], layer.weight.grad, atol=1e-7, rtol=1e-4)


def test_shares_of_processes_add_up():
    """What two processes would reduce: each takes its batches, and every sample counts once."""
    model, layers = setting()
    seen = []

    def load(batches):
        seen.extend(batches)
        return (DATA[batch] for batch in batches)

    for index in range(2):
        take(model, layers, load=load, process_index=index, world_size=2, batch_size=5)
    assert len(seen) == 4  # three batches, and the second process repeats one without weight
    assert sorted(i for batch in seen[:3] for i in batch) == list(range(12))


@pytest.mark.parametrize("of", ["token-gradients", "features"])
def test_moments_are_square_and_symmetric(of):
    model, layers = setting()
    for name, moment in take(model, layers, of).items():
        assert moment.shape == (next(layer.d_in for layer in layers if layer.name == name),) * 2
        torch.testing.assert_close(moment, moment.T)


def test_the_model_comes_back_in_its_mode_when_the_loss_fails():
    model, layers = setting()
    model.train()

    def loss(model, inputs):
        raise RuntimeError("my loss")

    with pytest.raises(RuntimeError, match="my loss"):
        take(model, layers, loss=loss)
    assert model.training
    assert all(layer.lora_A.requires_grad for layer in layers)


# ---- what a user's own loss and loader may ask for ----


class Asking(ContinualEBLoRATrainer):
    """A loss with whatever a user's reads of its trainer, and a loader of rows that only its own collator can join."""

    def compute_loss(self, model, inputs, **kwargs):
        progress = self.state.global_step / self.state.max_steps
        rate = self.lr_scheduler.get_last_lr()[0] + self.optimizer.param_groups[0]["lr"]
        trained = torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad])
        return super().compute_loss(model, inputs, **kwargs) + 1e-6 * (progress + rate + trained.sum())

    def get_train_dataloader(self):
        return DataLoader(Pairs(self.train_dataset), batch_size=4, collate_fn=join_pairs)


class Pairs(Dataset):
    """Rows that no default collator can join."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data) // 2

    def __getitem__(self, index):
        return (self.data[2 * index], self.data[2 * index + 1])


def join_pairs(pairs):
    rows = [row for pair in pairs for row in pair]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("method", ["eblora", "keeplora", "inflora"])
def test_a_loss_and_a_loader_find_what_training_has(tmp_path, method):
    make_trainer(tmp_path, cls=Asking, eblora_config=EBLoRAConfig(method=method)).train()
    assert PublishedSequence.open(tmp_path).names == ["one", "two"]


def test_an_error_in_a_snapshot_says_that_it_was_one(tmp_path):
    class Broken(ContinualEBLoRATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            raise KeyError("weights")

    with pytest.raises(KeyError) as error:
        make_trainer(tmp_path, cls=Broken).train()
    assert "while a snapshot of the task was taken" in "".join(error.value.__notes__)


SPEECH = {"num_mel_bins": 8, "max_source_positions": 8}
DROPS = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}
LAYERS = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES = {"vocab_size": 60, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
LAYERDROP = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OPT = {"vocab_size": 60, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 3}
CHECKPOINTING = {
    "Bart": (transformers.BartForConditionalGeneration, LAYERS | SIZES | LAYERDROP),
    "M2M100": (transformers.M2M100ForConditionalGeneration, LAYERS | SIZES | LAYERDROP),
    "Whisper": (transformers.WhisperForConditionalGeneration, LAYERS | SIZES | LAYERDROP | SPEECH),
    "OPT": (transformers.OPTForCausalLM, OPT | {"num_attention_heads": 2, "layerdrop": 0.5}),
}


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_models_that_drop_by_themselves_do_not_under_checkpointing(name):
    kind, sizes = CHECKPOINTING[name]

    def gradients(rates, checkpointing):
        torch.manual_seed(0)
        model = kind(kind.config_class(**sizes, **DROPS, **TOKENS)).train()
        for module in model.modules() if not rates else ():
            for key, value in vars(module).items():
                if "drop" in key and isinstance(value, float):
                    setattr(module, key, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(model, lora(target_modules=["q_proj", "v_proj", "fc1"]))
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        inputs = {"labels": torch.arange(3, 27).view(2, 12)}
        inputs |= {"input_features": torch.randn(2, 8, 16)} if name == "Whisper" else {"input_ids": inputs["labels"]}
        found = take(model, find_layers(model, "default"), load=lambda batches: [inputs], samples=4)
        for key, module in model.named_modules():
            rates = {name: value for name, value in before[key].items() if "drop" in name}
            assert {name: vars(module)[name] for name in rates} == rates
        assert model.training
        return found

    expected, found = gradients(rates=False, checkpointing=False), gradients(rates=True, checkpointing=True)
    for layer, gradient in expected.items():
        torch.testing.assert_close(found[layer], gradient, atol=1e-6, rtol=1e-4, msg=layer)
