import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eblora_hf.adapters.layers import find_layers
from eblora_hf.memory.gradients import mean_gradients, observed_gradients, share_batches, snapshot_indices
from eblora_hf.memory.moments import feature_moments, token_gradient_moments

from ..support.tiny import lora, make_model, make_text_data


def batches_of(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def loss(model, inputs):
    return model(**inputs).loss


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_equals_autograd_on_the_bare_model(kind):
    """Batches of unequal size, weighted by samples, against one backward pass over all samples of the bare model."""
    data = make_text_data("bert" if kind == "bert" else kind, size=10)
    bare = make_model(kind).eval()
    loss(bare, data[:10]).backward()
    targets = ["q", "v", "wi"] if kind == "t5" else ["query", "dense", "q_proj", "down_proj", "c_attn", "c_proj"]
    model = get_peft_model(make_model(kind), lora(target_modules=targets)).eval()
    layers = find_layers(model, "default")
    means = mean_gradients(model, layers, [(batch, len(batch["labels"])) for batch in batches_of(data, 4)], loss)
    for layer in layers:
        expected = layer.oriented(bare.get_submodule(layer.name).weight.grad)
        assert means[layer.name].shape == (layer.d_out, layer.d_in)
        torch.testing.assert_close(means[layer.name], expected, atol=1e-7, rtol=1e-4)


def test_leaves_the_model_as_it_was():
    model = get_peft_model(make_model("bert"), lora())
    layers = find_layers(model, "default")
    data = make_text_data("bert", size=4)
    loss(model, data[:4]).backward()
    before = {
        name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    with pytest.raises(RuntimeError, match="on purpose"):
        mean_gradients(
            model, layers, [(data[:4], 4)], lambda model, batch: (_ for _ in ()).throw(RuntimeError("on purpose"))
        )
    mean_gradients(model, layers, [(data[:4], 4)], loss)
    for name, parameter in model.named_parameters():
        flag, gradient = before[name]
        assert parameter.requires_grad == flag
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_is_summed_in_float32():
    model = get_peft_model(make_model("bert", dtype=torch.bfloat16), lora()).eval()
    layers = find_layers(model, "default")
    data = make_text_data("bert", size=4)
    means = mean_gradients(model, layers, [(data[:4], 4)] * 300, loss)
    once = mean_gradients(model, layers, [(data[:4], 4)], loss)
    for name, mean in means.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, once[name], atol=1e-6, rtol=1e-4)  # a bf16 sum stalls after 256 summands


def test_a_layer_without_gradient_is_named():
    model = get_peft_model(make_model("bert"), lora())
    layers = find_layers(model, "default")
    data = make_text_data("bert", size=4)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense: the loss sends no gradient"):
        mean_gradients(
            model,
            layers,
            [(data[:4], 4)],
            lambda model, batch: model(**batch, output_hidden_states=True).hidden_states[-1].sum(),
        )
    with pytest.raises(ValueError, match="no batch"):
        mean_gradients(model, layers, [], loss)


def test_indices():
    assert snapshot_indices(100, 0.2) == [int(i * 99 / 19) for i in range(20)]
    random = snapshot_indices(100, 0.2, seed=1)
    assert random == sorted(set(random)) == snapshot_indices(100, 0.2, seed=1)
    assert random != snapshot_indices(100, 0.2, seed=2)
    assert len(random) == 20
    assert snapshot_indices(3, 0.01) == [0]
    assert snapshot_indices(7, 1.0, seed=0) == list(range(7))
    with pytest.raises(ValueError, match="empty"):
        snapshot_indices(0, 0.2)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 20"):
        snapshot_indices(10, 20)


def test_outputs_may_be_changed_in_place():
    """As Falcon does to those of its last layer in a block."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 6)

        def forward(self, x):
            y = self.first(x)
            y += 1.0
            y = self.second(y.relu_())
            y *= x
            return y

    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 6)
    block(x).square().sum().backward()
    expected = {name: block.get_submodule(name).weight.grad.clone() for name in ("first", "second")}
    model = get_peft_model(block, LoraConfig(r=2, target_modules=["first", "second"]))
    layers = find_layers(model, "default")
    means = mean_gradients(model, layers, [({"x": x}, 1)], lambda model, batch: model(**batch).square().sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(means[name], gradient)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 5, 12, 13])
def test_shares_of_all_processes_hold_every_sample_once(count, processes):
    indices = list(range(100, 100 + count))
    shares = [share_batches(indices, 4, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1  # as many batches for each
    counted = [sample for share in shares for batch, weight in share if weight for sample in batch]
    assert sorted(counted) == indices
    assert all(weight in (0, len(batch)) and 0 < len(batch) <= 4 for share in shares for batch, weight in share)
    if processes == 1:
        assert [batch for batch, _ in shares[0]] == [indices[i : i + 4] for i in range(0, count, 4)]


def test_batches_of_weight_zero_count_for_nothing():
    model = get_peft_model(make_model("bert"), lora()).eval()
    layers, data = find_layers(model, "default"), make_text_data("bert", size=8)
    for collect in (mean_gradients, token_gradient_moments, feature_moments):
        alone = collect(model, layers, [(data[:4], 4)], loss)
        beside = collect(model, layers, [(data[:4], 4), (data[4:], 0)], loss)
        for name, matrix in alone.items():
            torch.testing.assert_close(beside[name], matrix)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_are_kept_as_autograd_keeps_them(checkpointing):
    """Under activation checkpointing they are computed again."""
    model = get_peft_model(make_model("llama"), lora())
    layers, data = find_layers(model, "default"), make_text_data("llama", size=4)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    inputs = {}
    for layer in layers:
        hook = lambda module, arguments, name=layer.name: inputs.update({name: weakref.ref(arguments[0])})  # noqa: E731
        layer.module.get_base_layer().register_forward_pre_hook(hook)
    with observed_gradients(model, layers, lambda *seen: None):
        result = loss(model, data[:4])
        alive = [name for name, reference in inputs.items() if reference() is not None]
        assert len(inputs) == len(layers)
        assert len(alive) == (0 if checkpointing else len(layers))
        result.backward()


MEASURE = """
import resource, torch
from peft import LoraConfig, get_peft_model
from torch import nn
from eblora_hf.memory.gradients import mean_gradients
from eblora_hf.adapters.layers import find_layers

torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)])  # 256 MiB of weights
model = get_peft_model(model, LoraConfig(r=2, target_modules=[str(i) for i in range(16)]))
layers = find_layers(model, "default")
loss = lambda model, batch: model(batch["x"]).square().mean()
with torch.no_grad():
    loss(model, {"x": torch.randn(2, 2048)})
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1024
mean_gradients(model, layers, [({"x": torch.randn(2, 2048)}, 2) for _ in range(3)], loss)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (16 * 2048 * 2048 * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_extra_memory_is_at_most_one_and_a_half_times_the_weights():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    ratio = float(result.stdout)
    assert 0.9 < ratio <= 1.5  # the sum alone is 1.0
