"""Both sides of a curvature: what is summed up, which directions are kept, and that files give it back."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.adapters.layers import find_layers
from eblora_hf.memory.basis import extend_basis
from eblora_hf.memory.curvature import CurvatureMoments, curvature_moments, output_root
from eblora_hf.memory.sketch import Sketch

from ..support.tiny import lora, make_model, make_text_data, orthonormal
from ..support.trainers import make_trainer


def test_both_sides_are_sums_over_tokens_for_each_item():
    """By hooks of PyTorch's own: K = Σ ‖nδ‖² x xᵀ / N and O = Σ n²δ δᵀ / N, with n the samples of a batch."""
    model = get_peft_model(make_model("bert", dtype=torch.float64), lora(exclude_modules=["classifier"]))
    layers = find_layers(model, "default")
    data = make_text_data("bert", size=10)
    batches = [(data[:4], 4), (data[4:10], 6)]
    expected = {layer.name: [0.0, 0.0] for layer in layers}
    for batch, n in batches:
        seen, handles = {}, []
        for layer in layers:

            def hook(module, inputs, output, name=layer.name, seen=seen):
                output.requires_grad_(True) if output.is_leaf else None
                output.register_hook(lambda g: seen.__setitem__(name, (inputs[0].detach(), g)))

            handles.append(layer.module.register_forward_hook(hook))
        model.eval()(**batch).loss.backward()
        for handle in handles:
            handle.remove()
        for name, (x, delta) in seen.items():
            x, delta = x.flatten(0, -2), n * delta.flatten(0, -2)
            expected[name][0] += (x * delta.square().sum(-1, keepdim=True)).mT @ x / 10
            expected[name][1] += delta.mT @ delta / 10
    found = curvature_moments(model.eval(), layers, batches, lambda model, batch: model(**batch).loss)
    for layer in layers:
        k, o = found[layer.name].inputs, found[layer.name].outputs
        torch.testing.assert_close(k, expected[layer.name][0], atol=1e-12, rtol=1e-6)
        if not isinstance(o, Sketch):
            torch.testing.assert_close(o, expected[layer.name][1], atol=1e-12, rtol=1e-6)
            continue
        whole, root = expected[layer.name][1], o.matrix.mT @ o.matrix
        assert o.energy == pytest.approx(whole.trace().item(), rel=1e-9)
        assert (whole - root).norm() < 0.2 * whole.norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_directions_after_the_new_columns(seed):
    """The next eigenvectors of the rest outside the basis, by the roots of their shares of the whole energy."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, 30).double()
    moment, basis = root @ root.mT, orthonormal(30, 3, seed=seed)
    extension = extend_basis(moment, basis, threshold=0.8, second_moment=True, beyond=4)
    p = torch.eye(30, dtype=torch.float64) - basis @ basis.mT
    energies, vectors = torch.linalg.eigh(p @ moment @ p)
    energies, vectors = energies.flip(0), vectors.flip(1)
    k = extension.columns.shape[1]
    expected = (vectors[:, k : k + 4] * energies[k : k + 4]) @ vectors[:, k : k + 4].mT / moment.trace()
    torch.testing.assert_close(extension.beyond @ extension.beyond.mT, expected, atol=1e-10, rtol=1e-8)
    assert (basis.mT @ extension.beyond).abs().max() < 1e-8
    assert (extension.columns.mT @ extension.beyond).abs().max() < 1e-8


def test_the_root_of_the_outputs_has_the_size_of_the_inputs():
    """Y Yᵀ with [`BasisExtension.beyond`] of trace 1 is O ⊗ Σ w x xᵀ / Σ w: independent of the items' scale twice."""
    x, delta = torch.randn(50, 9).double(), torch.randn(50, 7).double()
    weights = delta.square().sum(-1, keepdim=True)
    moments = CurvatureMoments((x * weights).mT @ x / 5, delta.mT @ delta / 5)
    root = output_root(moments, 7)
    c = (x * weights).mT @ x / weights.sum()
    torch.testing.assert_close(root @ root.mT, delta.mT @ delta / 5 * c.trace())
    few = output_root(moments, 2)
    assert few.shape == (7, 2)
    torch.testing.assert_close((few @ few.mT).trace(), torch.linalg.eigvalsh(root @ root.mT)[-2:].sum())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_snapshot_says_what_was_observed(tmp_path, kind):
    """One epoch of hardly moving weights, observed or in a snapshot afterwards, by tokens or by samples."""
    sizes = []
    for observe in (0.5, 0.0):
        still = {"direction_lr": 1e-6, "scale_lr": 1e-9, "energy_threshold": 0.5, "basis_dtype": "float32"}
        config = EBLoRAConfig(observe_steps=observe, snapshot_samples=6, **still)
        options = {"max_steps": 12, "learning_rate": 1e-9, "eblora_config": config}
        folder = tmp_path / str(observe)
        make_trainer(folder, kind, tasks=("one",), **options).train()
        (curvatures,) = ([tasks[0] for tasks in PublishedSequence.open(folder).curvatures().values()],)
        sizes.append([curvature.outputs.square().sum().item() for curvature in curvatures])
    # of a causal row of 8 labels the Trainer counts 8 items, and the model's own mean has 7 terms
    assert sizes[0] == pytest.approx([size * (7 / 8 if kind == "llama" else 1) for size in sizes[1]], rel=0.02)


def test_a_later_run_has_the_curvature_that_was_published(tmp_path):
    trainer = make_trainer(tmp_path, eblora_config=EBLoRAConfig(basis_dtype="float32"))
    trainer.train()
    held, read = trainer.begun._curvatures, PublishedSequence.open(tmp_path).curvatures()
    assert held.keys() == read.keys() == {layer.name for layer in trainer.layers}
    for name, tasks in held.items():
        assert len(tasks) == len(read[name]) == 2
        for mine, published in zip(tasks, read[name], strict=True):
            assert torch.equal(mine.inputs, published.inputs)
            assert torch.equal(mine.outputs, published.outputs)
            assert mine.outputs.shape[1] <= 8  # twice the rank
    without = make_trainer(tmp_path / "without", tasks=("one",), eblora_config=EBLoRAConfig(penalty_weight=0.0))
    without.train()
    assert PublishedSequence.open(tmp_path / "without").curvatures() == {}


def test_the_penalty_holds_back_what_earlier_tasks_react_to(tmp_path):
    """The second task's update costs less, by the curvature of the first, with it than without."""
    costs = []
    for weight in (0.0, 1e4):
        folder = tmp_path / str(weight)
        first = EBLoRAConfig(direction_lr=0.1, scale_lr=0.02, basis_dtype="float32")
        make_trainer(folder, tasks=("one",), max_steps=10, eblora_config=first).train()
        config = EBLoRAConfig(direction_lr=0.1, scale_lr=0.02, basis_dtype="float32", penalty_weight=weight)
        second = {"train_dataset": make_text_data("bert", seed=1), "task_name": "two", "sequence": folder}
        make_trainer(folder, max_steps=10, eblora_config=config, **second).train()
        published = PublishedSequence.open(folder)
        (curvatures, adapter) = published.curvatures(), published.adapters(["two"])[0]
        cost = 0.0
        for name, tasks in curvatures.items():
            key = next(key for key in adapter if name in key and "lora_A" in key)
            delta = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
            cost += (tasks[0].outputs.mT @ delta @ tasks[0].inputs).square().sum().item()
        costs.append(cost)
    assert 0.0 < costs[1] < 0.5 * costs[0]


def test_roots_that_do_not_fit_are_refused(tmp_path):
    make_trainer(tmp_path, tasks=("one",)).train()
    published = PublishedSequence.open(tmp_path)
    path = tmp_path / published.tasks[0].folder / "subspace.safetensors"
    whole = load_file(path)
    key = next(key for key in whole if key.endswith(".curvature_inputs"))
    for damaged, says in (
        (whole[key][:-1].contiguous(), r"a root of the curvature of .* has shape"),
        (torch.full_like(whole[key], float("nan")), "is not finite"),
    ):
        save_file(whole | {key: damaged}, path)
        with pytest.raises(ValueError, match=says):
            published.curvatures()
