"""One contract for every method on every architecture, and what is particular to each method."""

import copy
from typing import get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence, load_sequence
from eblora_hf.adapters.composition import EARLIER_TASKS, current_weight
from eblora_hf.adapters.layers import find_layers
from eblora_hf.benchmark.digits import Digits
from eblora_hf.benchmark.transformations import TRANSFORMATIONS
from eblora_hf.memory.basis import extend_basis, principal_weight_directions
from eblora_hf.memory.moments import feature_moments, token_gradient_moments
from eblora_hf.methods.base import Method
from eblora_hf.methods.build import build_method
from eblora_hf.methods.olora import OrthogonalityPenalty

from ..support.tiny import lora, make_arguments, make_model, make_text_data, orthonormal
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, get_stock_deltas, load_published

METHODS = get_args(get_type_hints(EBLoRAConfig)["method"])


def make_data(kind: str, seed: int, size: int = 24):
    if kind != "vit":
        return make_text_data(kind, seed, size)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 8, 8, generator=generator) * 2.0 - 1.0
    labels = torch.randint(10, (size,), generator=generator)
    transform = list(TRANSFORMATIONS.values())[seed]
    return Digits(images, labels).transformed(transform)


def make_trainer(folder, kind: str, method: str, options: dict | None = None, tasks=("one", "two"), **overrides):
    arguments = {key: overrides.pop(key) for key in list(overrides) if key in make_arguments(folder).to_dict()}
    defaults = {
        "model": make_model(kind),
        "args": make_arguments(folder, **arguments),
        "peft_config": lora(exclude_modules=["classifier"]) if kind in ("vit", "bert") else lora(),
        "eblora_config": EBLoRAConfig(method=method, **(options or {})),
        "train_dataset": {name: make_data(kind, seed) for seed, name in enumerate(tasks)},
    }
    return ContinualEBLoRATrainer(**(defaults | overrides))


def some_inputs(kind: str) -> dict:
    data = make_data(kind, seed=9)
    rows = [data[i] for i in range(4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# ---- the contract ----


@pytest.mark.parametrize(
    ("method", "kind"), [*((m, kind) for m in METHODS for kind in ("vit", "bert", "llama")), ("eblora", "gpt2")]
)
def test_contract(tmp_path, method, kind):
    """Trains, saves, reloads in stock PEFT, resumes to the same bits, composes."""
    trainer = make_trainer(tmp_path / "whole", kind, method, max_steps=4)
    assert trainer.train().global_step == 8
    published = PublishedSequence.open(tmp_path / "whole")
    inputs = some_inputs(kind)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(make_model(kind), tmp_path / "whole").eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert list(trainer.model.peft_config) == ["default"]

    total = {}
    for task in published.tasks:  # each task trained, and the root is their exact sum
        one = get_stock_deltas(kind, tmp_path / "whole" / task.folder)
        assert max(delta.abs().max() for delta in one.values()) > 1e-4
        total = {name: total.get(name, 0) + delta for name, delta in one.items()}
    for name, delta in get_stock_deltas(kind, tmp_path / "whole").items():
        torch.testing.assert_close(delta, total[name], atol=1e-6, rtol=1e-5)

    without = load_sequence(make_model(kind), tmp_path / "whole", exclude=["two"]).eval()
    two = get_stock_deltas(kind, tmp_path / "whole" / published.tasks[1].folder)
    for layer in find_layers(without, "default"):
        delta = layer.module.get_delta_weight("default")
        torch.testing.assert_close(delta, total[layer.name] - two[layer.name], atol=1e-6, rtol=1e-5)

    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", kind, method, callbacks=[InterruptAt("two", 3)], **saving).train()
    resumed = make_trainer(tmp_path / "parts", kind, method, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_answers_fit_together(method):
    """What a method says it needs, it uses: no snapshot is taken for nothing."""
    answers = build_method(EBLoRAConfig(method=method))
    assert answers.constrained == (type(answers).constrain is not Method.constrain)
    assert (answers.remembers is None) == (method in ("ebo", "lora", "olora", "ella", "osf"))
    assert (answers.starts_from is None) == (method in ("lora", "olora", "ella", "osf"))
    assert answers.orthonormal == (method in ("ebo", "eblora"))


# ---- O-LoRA ----


def test_olora_adds_the_gradient_of_its_penalty(tmp_path):
    """In float64 against autograd, with two earlier tasks, and under a fused optimizer's gradient scale."""
    model = make_model("bert", dtype=torch.float64)
    trainer = make_trainer(tmp_path, "bert", "olora", tasks=("one", "two"), model=model)
    trainer.train()
    layers = trainer.layers
    generator = torch.Generator().manual_seed(0)
    for layer in layers:  # stand in for the earlier tasks
        earlier = torch.nn.Linear(layer.d_in, 6, bias=False, dtype=torch.float64)
        earlier.weight.data = torch.randn(6, layer.d_in, generator=generator, dtype=torch.float64)
        layer.module.lora_A[EARLIER_TASKS] = earlier
        layer.lora_A.data = layer.lora_A.data.double()
        layer.lora_A.requires_grad_(True)
    overlaps = [layer.module.lora_A[EARLIER_TASKS].weight.detach() @ layer.lora_A.T for layer in layers]
    penalty = 0.3 * sum(overlap.square().sum() for overlap in overlaps)
    wanted = torch.autograd.grad(penalty, [layer.lora_A for layer in layers])
    optimizer = torch.optim.SGD([layer.lora_A for layer in layers], lr=0.1)
    hooks = OrthogonalityPenalty(optimizer, layers, 0.3)
    assert hooks.penalty() == pytest.approx(penalty.item())
    before = [layer.lora_A.detach().clone() for layer in layers]
    for layer in layers:
        layer.lora_A.grad = torch.zeros_like(layer.lora_A)
    optimizer.step()
    for layer, start, gradient in zip(layers, before, wanted, strict=True):
        torch.testing.assert_close(layer.lora_A.detach(), start - 0.1 * gradient)
    hooks.detach()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.grad_scale = torch.tensor(8.0)
    hooks.attach()
    for layer in layers:
        layer.lora_A.grad = torch.zeros_like(layer.lora_A)
        layer.lora_A.data.copy_(before[layers.index(layer)])
    hooks.before_step()
    for layer, gradient in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.lora_A.grad, 8.0 * gradient)


def test_olora_keeps_the_subspaces_of_tasks_apart(tmp_path):
    """A strong penalty leaves less overlap between the tasks' lora_A than none at all, in every layer."""
    overlaps = {}
    for weight in (0.0, 5.0):
        make_trainer(
            tmp_path / str(weight), "bert", "olora", {"orthogonality_weight": weight}, learning_rate=2e-2, max_steps=40
        ).train()
        one, two = PublishedSequence.open(tmp_path / str(weight)).adapters()
        keys = [key for key in one if "lora_A" in key]
        overlaps[weight] = [(one[key] @ two[key].T).norm().item() for key in keys]
    assert all(strong < 0.5 * none for none, strong in zip(overlaps[0.0], overlaps[5.0], strict=True))


# ---- KeepLoRA and InfLoRA ----


@pytest.mark.parametrize("basis_from", ["gradients", "features"])
def test_keeplora_protects_weights_and_earlier_tasks(tmp_path, basis_from):
    """ΔW M = 0 for the principal directions of the weights and for what earlier tasks added; only B is trained."""
    options = {"basis_from": basis_from, "weight_energy": 0.3, "energy_threshold": 0.9, "basis_dtype": "float32"}
    trainer = make_trainer(tmp_path, "bert", "keeplora", options, max_steps=20)
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    base = {layer.name: layer for layer in trainer.layers}
    for index, task in enumerate(published.tasks):
        deltas = get_stock_deltas("bert", tmp_path / task.folder)
        subspace = load_file(tmp_path / published.tasks[0].folder / "subspace.safetensors")
        for name, delta in deltas.items():
            first = principal_weight_directions(base[name].weight.detach(), 0.3)
            assert (delta @ first).abs().max() < 1e-6
            stored = subspace[f"{name}.columns"]
            torch.testing.assert_close(stored[:, : first.shape[1]], first)  # the first task brings them along
            if index == 1:
                assert (delta @ stored).abs().max() < 1e-6 * max(1.0, delta.norm())
    one = published.adapters()[0]
    for key in (key for key in one if "lora_A" in key):
        torch.testing.assert_close(one[key] @ one[key].T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("basis_from", ["gradients", "features"])
def test_keeplora_within_a_budget_keeps_the_directions_of_the_weights(tmp_path, basis_from):
    options = {"basis_from": basis_from, "basis_budget": 0.01}
    make_trainer(tmp_path, "bert", "keeplora", options).train()
    published = PublishedSequence.open(tmp_path)
    assert published.names == ["one", "two"]
    assert all(basis.shape[1] > 0 for basis in published.bases().values())


def test_keeplora_without_weights_starts_from_the_gradient(tmp_path):
    trainer = make_trainer(
        tmp_path, "bert", "keeplora", {"weight_energy": 0.0, "snapshot_fraction": 1.0}, tasks=("one",)
    )
    gradients = trainer.snapshot(trainer.tasks.tasks[0].train_dataset, seed=trainer.args.seed)
    trainer.train()
    (adapter,) = PublishedSequence.open(tmp_path).adapters()
    for name, gradient in gradients.items():
        right = torch.linalg.svd(gradient.double())[2][:4]
        a = adapter[f"base_model.model.{name}.lora_A.weight"].double()
        torch.testing.assert_close(a.T @ a, right.T @ right, atol=1e-4, rtol=0)


def test_inflora_starts_from_the_inputs_of_the_layers(tmp_path):
    """lora_A spans the leading directions of what really enters each layer, in float64 from the stacked inputs."""
    trainer = make_trainer(tmp_path, "bert", "inflora", {"snapshot_fraction": 1.0}, tasks=("one",))
    seen, handles = {}, []
    for layer in trainer.layers:
        hook = lambda module, args, name=layer.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))  # noqa: E731
        handles.append(layer.module.register_forward_pre_hook(hook))
    with torch.no_grad():
        trainer.model.eval()(**trainer.tasks.tasks[0].train_dataset[:])
    for handle in handles:
        handle.remove()
    trainer.train()
    (adapter,) = PublishedSequence.open(tmp_path).adapters()
    for name, inputs in seen.items():
        right = torch.linalg.svd(torch.cat(inputs).double(), full_matrices=False)[2][:4]
        a = adapter[f"base_model.model.{name}.lora_A.weight"].double()
        torch.testing.assert_close(a.T @ a, right.T @ right, atol=2e-3, rtol=0)


# ---- the feature snapshot ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_have_the_moment_of_the_inputs_without_padding(seed):
    model = make_model("bert", seed, dtype=torch.float64)
    peft = PeftModel(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["classifier"]))
    layers = find_layers(peft, "default")
    data = make_text_data("bert", seed)
    mask = torch.ones(24, 8, dtype=torch.long)
    mask[:, 5:] = 0
    batches = [({**data[i : i + 8], "attention_mask": mask[i : i + 8]}, 8) for i in range(0, 24, 8)]
    peft.eval()
    matrices = feature_moments(peft, layers, batches, lambda model, inputs: model(**inputs))
    inputs = {}
    first = next(layer for layer in layers if layer.name.endswith("layer.0.attention.self.query"))
    handle = first.module.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0]))
    with torch.no_grad():
        peft(**{**data[:], "attention_mask": mask})
    handle.remove()
    x = inputs["x"][:, :5].reshape(-1, first.d_in)
    torch.testing.assert_close(matrices[first.name], x.T @ x / len(x))
    assert all(matrix.dtype == torch.float64 for matrix in matrices.values())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_token_gradients_have_the_moment_of_single_gradients(kind, seed):
    """Against the gradient of each sample at each position, one by one, in float64; parameters stay as they were."""
    model = make_model(kind, seed, dtype=torch.float64)
    peft = PeftModel(model, lora(r=2, exclude_modules=["classifier"]))
    layers = find_layers(peft, "default")
    data = make_text_data(kind, seed, size=6, length=4)
    batches = [(data[:4], 4), (data[4:], 2)]
    flags = [parameter.requires_grad for parameter in peft.parameters()]
    matrices = token_gradient_moments(peft.eval(), layers, batches, lambda model, inputs: model(**inputs).loss)
    assert flags == [parameter.requires_grad for parameter in peft.parameters()]
    assert all(parameter.grad is None for parameter in peft.parameters())
    layer = layers[seed]
    seen = {}

    def keep(module, arguments, output):
        seen.update(x=arguments[0].detach(), y=output)
        output.retain_grad()

    handle = layer.module.register_forward_hook(keep)
    wanted = torch.zeros(layer.d_in, layer.d_in, dtype=torch.float64)
    for inputs, count in batches:
        (peft(**inputs).loss * count).backward()
        for x, delta in zip(seen["x"].flatten(0, -2), seen["y"].grad.flatten(0, -2), strict=True):
            gradient = torch.outer(delta, x)  # (d_out, d_in)
            wanted += gradient.T @ gradient / (6 * 4)
    handle.remove()
    torch.testing.assert_close(matrices[layer.name], wanted)


def test_token_gradients_work_on_frozen_models_and_under_checkpointing():
    model = make_model("llama", dtype=torch.float64)
    peft = PeftModel(model, lora(r=2))
    layers = find_layers(peft, "default")
    batches = [(make_text_data("llama")[:4], 4)]
    loss = lambda model, inputs: model(**inputs).loss  # noqa: E731
    plain = token_gradient_moments(peft.eval(), layers, batches, loss)
    with peft.disable_adapter():
        frozen = token_gradient_moments(peft, layers, batches, loss)
    peft.gradient_checkpointing_enable({"use_reentrant": False})
    peft.train()
    checkpointed = token_gradient_moments(peft, layers, batches, loss)
    for name in plain:  # a fresh adapter changes nothing
        torch.testing.assert_close(frozen[name], plain[name])
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_features_need_data_and_a_used_layer():
    peft = PeftModel(make_model("bert"), LoraConfig(r=2, target_modules=["query"]))
    layers = find_layers(peft, "default")
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query: the snapshot's batches say nothing"):
        feature_moments(peft, layers, [], lambda model, inputs: model(**inputs))


# ---- orthogonal subspace fine-tuning ----


def test_osf_protects_its_subspace_and_keeps_every_task(tmp_path):
    """100 AdamW steps a task move nothing inside the top singular directions; the loop loses no task."""
    options = {"weight_energy": 0.6, "stored_energy": 1.0}
    arguments = {"max_steps": 100, "save_strategy": "steps", "save_steps": 100}
    trainer = make_trainer(tmp_path, "bert", "osf", options, learning_rate=1e-2, weight_decay=0.1, **arguments)
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    model = make_model("bert")
    weights = {layer.name: layer.weight.detach().double() for layer in trainer.layers}
    assert all(torch.equal(weights[name].float(), model.get_submodule(name).weight) for name in weights)
    for task in published.tasks:
        deltas = get_stock_deltas("bert", tmp_path / task.folder)
        state = load_file(tmp_path / "checkpoints" / task.name / "checkpoint-100" / "eblora_state.safetensors")
        for name, delta in deltas.items():
            u, v = state[f"{name}.U"].double(), state[f"{name}.V"].double()  # what was protected…
            sigma = torch.linalg.svdvals(weights[name])
            energy = sigma.square().cumsum(0) / sigma.square().sum()
            k = int((energy < 0.6).sum()) + 1
            torch.testing.assert_close(
                u.T @ weights[name] @ v, torch.diag(sigma[:k]), atol=1e-5, rtol=0
            )  # …is the top
            delta = delta.double()
            assert (u.T @ delta).abs().max() < 1e-5
            assert (delta @ v).abs().max() < 1e-5
            assert delta.norm() > 0.1  # it moved elsewhere
            assert torch.linalg.matrix_rank(delta, rtol=1e-4) > 4  # by more than the rank of the LoraConfig
            weights[name] = weights[name] + delta
    for layer in find_layers(load_sequence(make_model("bert"), tmp_path), "default"):
        reached = layer.weight.detach().double() + layer.module.get_delta_weight("default").double()
        torch.testing.assert_close(reached, weights[layer.name], atol=1e-5, rtol=0)


def test_osf_stores_the_energy_asked_for(tmp_path):
    """The stored adapter is the best approximation of the update with the fewest directions of that energy."""
    deltas = {}
    for share in (1.0, 0.8):
        trainer = make_trainer(tmp_path / str(share), "bert", "osf", {"stored_energy": share}, tasks=("one",))
        trainer.train()
        deltas[share] = get_stock_deltas("bert", tmp_path / str(share))
    ranks = set()
    for name, whole in deltas[1.0].items():
        sigma = torch.linalg.svdvals(whole.double())
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        rank = int((energy < 0.8).sum()) + 1
        ranks.add(rank)
        error = (whole - deltas[0.8][name]).norm().square() / whole.norm().square()
        assert error == pytest.approx(1.0 - energy[rank - 1].item(), abs=1e-3)
        assert torch.linalg.matrix_rank(deltas[0.8][name], rtol=1e-4) == rank
    adapter = PublishedSequence.open(tmp_path / "0.8").adapters()[0]
    assert {value.shape[0] for key, value in adapter.items() if "lora_A" in key} == ranks  # nothing but what counts


def test_osf_finds_the_weights_that_earlier_tasks_left(tmp_path):
    trainer = make_trainer(tmp_path, "bert", "osf")
    seen = []
    begin = trainer.method.begin_task
    trainer.method.begin_task = lambda layers, *args: (
        seen.append({layer.name: current_weight(layer).clone() for layer in layers}) or begin(layers, *args)
    )
    base = {name: p.detach().clone() for name, p in make_model("bert").named_parameters()}
    trainer.train()
    first = get_stock_deltas("bert", tmp_path / "tasks/00-one")
    for name, delta in first.items():
        torch.testing.assert_close(seen[0][name], base[f"{name}.weight"])
        torch.testing.assert_close(seen[1][name], base[f"{name}.weight"] + delta, atol=1e-6, rtol=1e-5)


def test_osf_keeps_a_trained_head(tmp_path):
    """Renewing the adapter at another rank does not throw away what the head has learnt."""
    trainer = make_trainer(tmp_path, "bert", "osf", peft_config=lora(task_type="SEQ_CLS"), learning_rate=1e-2)
    before = copy.deepcopy(trainer.model.get_base_model().classifier.original_module.weight)
    trainer.train()
    heads = [adapter["base_model.model.classifier.weight"] for adapter in PublishedSequence.open(tmp_path).adapters()]
    assert not torch.equal(heads[0], before)
    assert (heads[1] - heads[0]).norm() < (heads[1] - before).norm()  # the second task went on from the first
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path, task_type="SEQ_CLS")
    assert torch.equal(loaded.get_base_model().classifier.modules_to_save["default"].weight, heads[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_energy": 1.0}, r"weight_energy=1\.0\): expected a share in \[0, 1\)"),
        ({"weight_energy": -0.1}, r"weight_energy=-0\.1"),
        ({"stored_energy": 0.0}, r"stored_energy=0\.0\): expected a share in \(0, 1\]"),
        ({"orthogonality_weight": float("nan")}, "orthogonality_weight=nan"),
        ({"basis_from": "weights"}, "basis_from='weights'.*gradients, token-gradients, features"),
        ({"method": "sefe"}, "method='sefe'.*osf"),
        ({"method": "inflora", "basis_from": "gradients"}, "basis_from='gradients'.*one of features"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        EBLoRAConfig(**options)


# ---- what a run may meet ----


def test_an_optimizer_that_does_not_know_the_parameters_is_refused(tmp_path):
    """OSF renews the adapter at another rank; an optimizer made before would train nothing."""
    model = get_peft_model(make_model("llama"), lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    trainer = make_trainer(
        tmp_path, "llama", "osf", tasks=("one",), model=model, peft_config=None, optimizers=(optimizer, None)
    )
    with pytest.raises(ValueError, match=r"does not hold lora_B of .*'osf'.*optimizer_cls_and_kwargs"):
        trainer.train()


def test_resuming_with_another_method_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "tasks": ("one",)}
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, "bert", "keeplora", callbacks=[InterruptAt("one", 3)], **saving).train()
    other = make_trainer(tmp_path, "bert", "inflora", **saving)
    with pytest.raises(ValueError, match="was trained with the method 'keeplora', not with 'inflora'"):
        other.train(resume_from_checkpoint=True)


def test_osf_that_fails_at_the_end_of_a_task_resumes_to_the_same(tmp_path, monkeypatch):
    """What is truncated once is not truncated again."""
    options = {"stored_energy": 0.8}
    make_trainer(tmp_path / "whole", "bert", "osf", options, tasks=("one",)).train()
    failing = make_trainer(tmp_path / "parts", "bert", "osf", options, tasks=("one",))
    monkeypatch.setattr(failing.method, "end_task", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.train()
    make_trainer(tmp_path / "parts", "bert", "osf", options, tasks=("one",)).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_keeplora_protects_the_weights_after_tasks_of_another_method(tmp_path):
    make_trainer(tmp_path, "bert", "eblora", {"energy_threshold": 0.5}, tasks=("one",)).train()
    options = {"weight_energy": 0.3, "energy_threshold": 0.5}
    tasks = {"two": make_data("bert", 1), "three": make_data("bert", 2)}
    trainer = make_trainer(tmp_path, "bert", "keeplora", options, train_dataset=tasks, sequence=tmp_path)
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    for layer in trainer.layers:
        first = principal_weight_directions(layer.weight.detach(), 0.3)
        basis = published.bases()[layer.name].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
        assert ((first.double() - basis @ (basis.T @ first.double())).norm(dim=0) < 2e-3).all()
    for task in published.tasks[1:]:
        for name, delta in get_stock_deltas("bert", tmp_path / task.folder).items():
            first = principal_weight_directions(make_model("bert").get_submodule(name).weight.detach(), 0.3)
            assert (delta @ first).norm() < 2e-3 * delta.norm()


def test_noise_of_a_moment_is_no_direction():
    """Inputs that span five directions give a basis of five, also at an energy threshold of 1."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 8))
    peft = PeftModel(model, LoraConfig(r=2, target_modules=["0"]))
    inputs = {"input": orthonormal(32, 5, dtype=torch.float32).T * torch.tensor([[3.0], [2.0], [1.0], [0.5], [0.2]])}
    forward = lambda model, inputs: model(inputs["input"])  # noqa: E731
    matrices = feature_moments(peft, find_layers(peft, "default"), [(inputs, 5)], forward)
    assert extend_basis(matrices["0"], threshold=1.0, second_moment=True).columns.shape == (32, 5)
