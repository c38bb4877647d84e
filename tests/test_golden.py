"""Parity with the released algorithm, case by case, in the tolerances the cases state."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from eblora_hf import metrics
from eblora_hf.adapters.factors import Factors
from eblora_hf.manifold import maps
from eblora_hf.manifold.constraint import StiefelConstraint
from eblora_hf.memory.basis import extend_basis, principal_directions, principal_weight_directions
from eblora_hf.memory.gradients import mean_gradients, snapshot_indices
from eblora_hf.methods.eblora import initial_scale

GOLDEN = Path(os.environ.get("EBLORA_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
MANIFEST = (
    json.loads((GOLDEN / "manifest.json").read_text()) if (GOLDEN / "manifest.json").is_file() else {"cases": []}
)
pytestmark = pytest.mark.skipif(
    not MANIFEST["cases"], reason=f"no golden cases in {GOLDEN}; set EBLORA_GOLDEN to their folder"
)

_files: dict[str, dict[str, torch.Tensor]] = {}


def tensor(case: dict, key: str) -> torch.Tensor:
    name = case["file"]
    if name not in _files:
        data = (GOLDEN / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == MANIFEST["files"][name]["sha256"], f"{name} is damaged"
        _files[name] = safetensors.torch.load(data)
    return _files[name][key]


def inputs(case: dict) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, case["dtype"])
    return {name: tensor(case, key).to(dtype) for name, key in case["inputs"].items()}


def compare(case: dict, name: str, actual) -> None:
    """Checks one expected value by the comparison the manifest names; projectors in float64."""
    expected = case["expected"][name]
    kind, atol, rtol = expected["compare"], expected.get("atol", 0.0), expected.get("rtol", 0.0)
    if kind == "equal":
        assert actual == expected["value"], name
        return
    if kind == "close":
        assert abs(actual - expected["value"]) <= atol, name
        return
    if kind == "allclose_product":
        wanted = None
        for key in expected["keys"]:
            factor = tensor(case, key).double()
            factor = torch.diag(factor) if factor.ndim == 1 else factor
            wanted = factor if wanted is None else wanted @ factor
    else:
        wanted = tensor(case, expected["key"]).double()
    actual = actual.double()
    if kind == "projector_rows":
        assert actual.shape[0] == wanted.shape[0], name
        actual, wanted = actual.T @ actual, wanted.T @ wanted
    elif kind == "projector_cols":
        assert actual.shape[1] == wanted.shape[1], name
        actual, wanted = actual @ actual.T, wanted @ wanted.T
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")


def cases(*categories: str) -> list:
    return [pytest.param(case, id=case["id"]) for case in MANIFEST["cases"] if case["category"] in categories]


@pytest.mark.parametrize("case", cases("stiefel"))
def test_stiefel(case):
    data = inputs(case)
    x, g, basis = data["X"], data["G"], data.get("F")
    function = case["function"]
    if function.startswith("polar_retraction"):
        actual = maps.polar_retraction(x, g, basis)
    elif function == "tangent_project":
        actual = maps.orthogonal_tangent(x, g, basis)
    else:  # euclidean2riemannian_* and tangent_project_U/_Vt are one map in the released code
        actual = maps.canonical_tangent(x, g, basis)
    compare(case, "Y", actual)


class _Layer:
    """What the constraint needs of a layer, without a model around it."""

    scaling = 2.0

    def __init__(self, name: str, u: torch.Tensor, v: torch.Tensor):
        self.name = name
        self.lora_B, self.lora_A = nn.Parameter(u.clone()), nn.Parameter(v.mT.clone())
        self.d_out, self.rank, self.d_in = *u.shape, v.shape[0]


class _GivenGradients(StiefelConstraint):
    """
    The trajectories prescribe dL/dU, dL/dV and dL/ds independently; no dL/dB has all three, so they are fed here.
    """

    given: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def apply_chain_rule(self, stack, rows, z, inner):
        for scale, layer in zip(stack.scales[rows], stack.layers[rows], strict=True):
            scale.grad = self.given[self.layers[layer].name][2].clone()


@pytest.mark.parametrize("case", cases("trajectory"))
def test_trajectory(case):
    data, hyper = inputs(case), case["hyper"]
    names = [f"m{i}" for i in range(hyper["n_modules"])]
    layers = [_Layer(name, data[f"{name}.U0"], data[f"{name}.A0"].mT) for name in names]
    parameters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
    betas, eps, decay = tuple(hyper["betas"]), hyper["eps"], hyper["weight_decay"]
    optimizer = torch.optim.AdamW(parameters, lr=hyper["lr"], betas=betas, eps=eps, weight_decay=decay)
    scaling = hyper["grad_scaling"]
    constraint = _GivenGradients(
        optimizer,
        layers,
        {name: Factors(data[f"{name}.U0"], data[f"{name}.A0"].mT, data[f"{name}.s0"].item()) for name in names},
        {name: data[f"{name}.F"] for name in names if f"{name}.F" in data},
        direction_lr=1.0,
        scale_lr=hyper["lr"],
        step_scaling="none" if scaling is None else "rank",
        step_constant=scaling or 1.0,
        scale_betas=betas,
        scale_eps=eps,
        scale_weight_decay=decay,
    )
    history = {f"{name}.{key}": [] for name in names for key in ("U", "A", "s")}
    for step in range(hyper["steps"]):
        if hyper["lr_per_step"] is not None:
            optimizer.param_groups[0]["lr"] = hyper["lr_per_step"][step]
        constraint.given = {name: tuple(data[f"{name}.{key}"][step] for key in ("gU", "gA", "gs")) for name in names}
        for layer in layers:
            layer.lora_B.grad, layer.lora_A.grad = (given.clone() for given in constraint.given[layer.name][:2])
        optimizer.step()
        for layer, scale in zip(layers, constraint.scales, strict=True):
            factors = constraint.factors()[layer.name]
            history[f"{layer.name}.U"].append(factors.U.clone())
            history[f"{layer.name}.A"].append(factors.V.mT.clone())
            history[f"{layer.name}.s"].append(scale.detach().clone())
            torch.testing.assert_close(layer.lora_A.data, factors.V.mT)
            torch.testing.assert_close(layer.lora_B.data, factors.U * (scale.detach() / layer.scaling))
    for name in case["expected"]:
        compare(case, name, torch.stack(history[name]))


def _chunk_mean(data: dict[str, torch.Tensor], task: int) -> torch.Tensor:
    chunks = [data[name] for name in sorted(data) if name.startswith(f"G{task}.chunk")]
    return torch.stack(chunks).mean(dim=0)


@pytest.mark.parametrize("case", cases("gpm_sequence"))
def test_gpm_sequence(case):
    data, hyper = inputs(case), case["hyper"]
    basis, ranks = None, []
    for task in range(1, hyper["n_tasks"] + 1):
        extension = extend_basis(_chunk_mean(data, task), basis, threshold=hyper["threshold"])
        basis = extension.columns if basis is None else torch.cat([basis, extension.columns], dim=1)
        ranks.append(basis.shape[1])
        compare(case, f"M{task}", basis.T)
    compare(case, "ranks", ranks)


@pytest.mark.parametrize("case", cases("gpm_update"))
def test_gpm_update(case):
    data = inputs(case)
    before = data["M_prev"].T if "M_prev" in data else torch.zeros(case["hyper"]["d_in"], 0, dtype=data["G"].dtype)
    columns = extend_basis(
        data["G"], before if before.shape[1] else None, threshold=case["hyper"]["threshold"]
    ).columns
    basis = torch.cat([before, columns], dim=1)
    compare(case, "M", basis.T)
    compare(case, "rank", basis.shape[1])


@pytest.mark.parametrize("case", cases("init_fixed_rank"))
def test_init_fixed_rank(case):
    data = inputs(case)
    basis = data["M_prev"].T if "M_prev" in data else None
    u, sigma, v = principal_directions(data["G"], case["hyper"]["rank"], basis)
    compare(case, "A_rowspace", v.T)
    compare(case, "B_colspace", u)
    compare(case, "S", sigma)
    compare(case, "BA", u @ v.T)
    compare(case, "B_diagS_A", u @ torch.diag(sigma) @ v.T)


@pytest.mark.parametrize("case", cases("weight_subspace"))
def test_weight_subspace(case):
    basis = principal_weight_directions(inputs(case)["W"], case["hyper"]["threshold"])
    compare(case, "M", basis.T)
    compare(case, "rank", basis.shape[1])


@pytest.mark.parametrize("case", cases("scale_init", "scale_init_official_path"))
def test_scale_init(case):
    hyper = case["hyper"]
    assumed = hyper.get("num_layers_assumed", hyper["num_layers"])
    scales = [initial_scale(depth, assumed, hyper["alpha"], hyper["beta"]) for depth in range(hyper["num_layers"])]
    compare(case, "s", torch.tensor(scales, dtype=torch.float64))
    if "s_without_layer_index" in case["expected"]:
        compare(case, "s_without_layer_index", initial_scale(None, assumed, hyper["alpha"], hyper["beta"]))


@pytest.mark.parametrize("case", cases("layer"))
def test_layer(case):
    """
    The released layer with its own scale parameter equals stock PEFT LoRA with B = (s/γ) U, where s = γ s_released.
    """
    from peft import LoraConfig, get_peft_model

    from eblora_hf.adapters.layers import find_layers

    data, hyper = inputs(case), case["hyper"]
    dtype = getattr(torch, case["dtype"])
    model = nn.Sequential(nn.Linear(hyper["d_in"], hyper["d_out"], dtype=dtype))
    model[0].weight.data, model[0].bias.data = data["W"].clone(), data["bias"].clone()
    config = LoraConfig(r=hyper["r"], lora_alpha=hyper["lora_alpha"], target_modules=["0"])
    peft_model = get_peft_model(model, config)
    (layer,) = find_layers(peft_model, "default")
    s = hyper["scaling"] * data["s"].item()
    layer.lora_A.data, layer.lora_B.data = data["A"].clone(), data["B"] * (s / layer.scaling)
    y = peft_model(data["x"])
    compare(case, "y", y)
    compare(case, "delta_W", layer.module.get_delta_weight("default"))
    (y * data["dY"]).sum().backward()
    compare(case, "gA", layer.lora_A.grad)

    class Gradients(StiefelConstraint):
        def _lend(self, stack, rows):
            if not stack.is_v:
                self.g_u = stack.ratios(rows)[0] * stack.parameters[0].grad
            super()._lend(stack, rows)

        def _after_step(self, optimizer, args, kwargs):
            self.g_s = self.scales[0].grad.clone()

    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1.0)
    factors = {layer.name: Factors(data["B"], data["A"].mT, s)}
    constraint = Gradients(optimizer, [layer], factors, direction_lr=1.0, scale_lr=1.0)
    optimizer.step()
    compare(case, "gB", constraint.g_u)
    compare(case, "gs", hyper["scaling"] * constraint.g_s)  # s = γ s_released
    constraint.write()
    peft_model.merge_adapter()
    compare(case, "W_merged", layer.weight)


@pytest.mark.parametrize("case", cases("gradient_snapshot"))
def test_gradient_snapshot(case):
    """Weight 1 for every batch and a plain mean over chunks give the released rule."""
    table, hyper = inputs(case)["per_sample_grads"], case["hyper"]
    indices = snapshot_indices(hyper["n_samples_total"], hyper["data_ratio"])
    size, chunks = len(indices) // hyper["num_chunks"], []
    for c in range(hyper["num_chunks"]):
        last = c == hyper["num_chunks"] - 1
        chunks.append(indices[c * size :] if last else indices[c * size : (c + 1) * size])
    compare(case, "indices_per_chunk", chunks)

    class OneLayer:
        name = "layer"
        d_out, d_in = hyper["d_out"], hyper["d_in"]
        module = nn.Linear(d_in, d_out, bias=False, dtype=table.dtype)
        weight, sum_dtype = module.weight, table.dtype

    def loss(model, batch):
        """With the unit vectors as tokens, each sample's gradient is its matrix in the table."""
        units = torch.eye(OneLayer.d_in, dtype=table.dtype).expand(len(batch["rows"]), -1, -1)
        return (model(units) * table[batch["rows"]].mT).sum(dim=(1, 2)).mean()

    means = []
    for chunk in chunks:
        step = hyper["batch_size"]
        batches = [({"rows": chunk[i : i + step]}, 1) for i in range(0, len(chunk), step)]
        means.append(mean_gradients(OneLayer.module, [OneLayer], batches, loss)["layer"])
    for c, mean in enumerate(means):
        compare(case, f"chunk{c}", mean)
    compare(case, "merged", torch.stack(means).mean(dim=0))


@pytest.mark.parametrize("case", cases("metrics_mtil"))
def test_metrics(case):
    matrix = 100 * np.array(case["inputs"]["acc_inline"])
    expected = case["expected"]["metrics"]["value"]
    for i, value in enumerate(expected["transfer"], start=1):
        assert abs(matrix[:i, i].mean() - value) <= 0.05 + 1e-6
    assert abs(metrics.transfer(matrix) - expected["mean"]["transfer"]) <= 0.05 + 1e-6
    assert abs(metrics.mean_final_accuracy(matrix) - expected["mean"]["last"]) <= 0.05 + 1e-6
    np.testing.assert_allclose(matrix.mean(axis=0), expected["avg"], atol=0.05 + 1e-6)


@pytest.mark.parametrize("case", cases("keeplora_subspace"))
def test_keeplora_subspace(case):
    """Matrices are given as `(d, n)`, and the left singular vectors count."""
    hyper, bases, ranks = case["hyper"], {}, []
    for key, matrix in inputs(case).items():
        update, layer = key.split(".", 1)
        if update == "t0":
            bases[layer] = principal_weight_directions(matrix.T, hyper["threshold_first"])
        else:
            added = extend_basis(matrix.T, bases[layer], threshold=hyper["threshold_later"]).columns
            bases[layer] = torch.cat([bases[layer], added], dim=1)
        compare(case, f"M.{key}", bases[layer])
        ranks.append([key, bases[layer].shape[1]])
    compare(case, "ranks", ranks)


@pytest.mark.parametrize("case", cases("keeplora_init"))
def test_keeplora_init(case):
    """A is the transpose of ours; the released B = Σ Qᵀ is subtracted from the weights, ours counts from there."""
    data, hyper = inputs(case), case["hyper"]
    gradients = dict(zip("qkv", data["grad_in_proj"].chunk(3), strict=True)) | {"o": data["grad_out_proj"]}
    weights = dict(zip("qkv", data["W_qkv"].chunk(3), strict=True)) | {"o": data["W_o"]}
    corrected = {}
    for name, gradient in gradients.items():
        u, sigma, v = principal_directions(gradient, hyper["r"], data.get(f"M_{name}"))
        compare(case, f"A_{name}", v)
        compare(case, f"AB_{name}", v @ torch.diag(sigma) @ u.T)
        corrected[name] = weights[name] - hyper["scaling"] * (u * sigma) @ v.T
    compare(case, "W_qkv_corrected", torch.cat([corrected[name] for name in "qkv"]))
    compare(case, "W_o_corrected", corrected["o"])
    if "delta_q" in case["expected"]:
        u, sigma, v = principal_directions(gradients["q"], hyper["r"], data.get("M_q"))
        compare(case, "delta_q", hyper["scaling"] * (u * sigma) @ v.T)
