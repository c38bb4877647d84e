"""The embedded benchmark: its data, its command line, and (slow) what the methods reach."""

import copy
import json
import os
import stat

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eblora_hf import ContinualEBLoRATrainer, __version__, load_sequence
from eblora_hf.benchmark import digits
from eblora_hf.benchmark.protocol import MethodResult, run_method
from eblora_hf.benchmark.report import plot_matrices, save_results
from eblora_hf.cli import app

from .conftest import lora, make_arguments

runner = CliRunner()


def test_splits_are_disjoint_seeded_and_scaled():
    splits = digits.load_digits(0)
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 900,
        "validation": 360,
        "test": 537,
    }
    images = torch.cat([split.images for split in splits.values()])
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1.0, 1.0)
    everything = images.flatten(1).sum(dim=0)
    assert torch.equal(everything, torch.cat([s.images for s in digits.load_digits(1).values()]).flatten(1).sum(dim=0))
    assert not torch.equal(splits["train"].images, digits.load_digits(1)["train"].images)
    assert torch.equal(splits["train"].images, digits.load_digits(0)["train"].images)


def test_transformations():
    ramp = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    assert torch.equal(digits.swap_columns(ramp)[..., 0], ramp[..., 1])
    assert torch.equal(digits.swap_columns(digits.swap_columns(ramp)), ramp)
    assert torch.equal(digits.invert_left_half(ramp)[..., :4], -ramp[..., :4])
    assert torch.equal(digits.invert_left_half(ramp)[..., 4:], ramp[..., 4:])
    grid = digits.overlay_grid(ramp)
    assert (grid[..., ::4, :] == 0.7).all()
    assert (grid[..., :, ::4] == 0.7).all()
    assert torch.equal(grid[..., 1, 1], ramp[..., 1, 1])
    torch.testing.assert_close(digits.rotate(ramp, 90.0), torch.rot90(ramp, 1, (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.rotate(ramp, 0.0), ramp, atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.shear(ramp, 0.0), ramp, atol=1e-5, rtol=0)
    assert digits.edges(ramp).amax() == pytest.approx(1.0)
    assert digits.edges(torch.full((1, 1, 8, 8), 0.3)).unique().tolist() == [-1.0]
    for transform in digits.TASKS.values():
        before = ramp.clone()
        assert transform(ramp).shape == ramp.shape
        assert torch.equal(ramp, before)


def a_result() -> MethodResult:
    matrix = (np.arange(36).reshape(6, 6) * 2.0).tolist()
    return MethodResult(50.0, 60.0, float("nan"), 70.0, 20.0, 90.0, matrix, [1.0, 0.5, 0.2, 0.1])


def test_json_and_plot(tmp_path):
    save_results({"lora": a_result(), "eblora": a_result()}, 3, tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seed"] == 3
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["methods"]["eblora"]) == {
        "MFN", "MAA", "BWT", "LA", "FWT", "base", "accuracy_matrix", "sigma_ratio",
    }  # fmt: skip
    assert content["methods"]["lora"]["BWT"] is None
    plot_matrices({"lora": a_result(), "eblora": a_result()}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_line():
    assert runner.invoke(app, ["--version"]).output == f"eblora_hf {__version__}\n"
    assert "demo" in runner.invoke(app, ["--help"]).output
    wrong = runner.invoke(app, ["demo", "--methods", "lora,magic"])
    assert wrong.exit_code == 2
    assert "lora,magic" in wrong.output
    assert runner.invoke(app, ["demo", "--methods", "lora,lora"]).exit_code == 2
    assert runner.invoke(app, ["demo", "--seed", "-1"]).exit_code == 2


def test_unwritable_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["demo", "--output", str(tmp_path / "file" / "sub")])
    assert result.exit_code == 2
    assert "cannot write to" in result.output
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert runner.invoke(app, ["demo", "--output", str(tmp_path)]).exit_code == 2


def test_demo_runs_on_a_shortened_protocol(tmp_path, monkeypatch):
    """All of the demo but its length: one method, two steps a task."""
    monkeypatch.setattr("eblora_hf.benchmark.protocol.STEPS_PER_TASK", 2)
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 20)
    result = runner.invoke(
        app, ["demo", "--methods", "frozen,eblora", "--output", str(tmp_path / "out"), "--seed", "1"]
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(content["methods"]) == ["frozen", "eblora"]
    assert content["methods"]["eblora"]["sigma_ratio"] == pytest.approx([1.0] * 4, abs=1e-4)
    assert (tmp_path / "out" / "accuracy_matrices.png").is_file()
    assert "eblora" in result.output
    frozen = np.array(content["methods"]["frozen"]["accuracy_matrix"])
    assert (frozen == frozen[0]).all()


@pytest.mark.slow
def test_methods_reach_what_they_should(monkeypatch):
    """Seed 0: EBLoRA at least 12 points over LoRA, forgets little, balanced spectra; and it needs no tuning."""
    with digits.steady_cpu():
        splits = digits.load_digits(0)
        base = digits.pretrain(0, splits["train"])
        lora = run_method("lora", base, splits, 0)
        eblora = run_method("eblora", base, splits, 0)
        assert eblora.MFN - lora.MFN >= 12
        assert eblora.BWT >= -20
        assert eblora.base >= 82
        assert lora.sigma_ratio[1] <= 0.6
        assert eblora.sigma_ratio[-1] >= 0.999
        tuned = run_method(
            "eblora", base, splits, 0, settings={"learning_rate": 5e-3, "direction_lr": 0.4, "scale_lr": 0.02}
        )
        for learning_rate in (2e-4, 5e-3):
            untuned = run_method("eblora", base, splits, 0, settings={"learning_rate": learning_rate})
            assert untuned.MFN >= tuned.MFN - 4
        again = run_method("eblora", base, splits, 0)
        assert again == eblora  # the same numbers every time


@pytest.mark.slow
def test_a_bf16_base_is_composed_to_the_same_logits(tmp_path):
    """What is loaded from disk computes what the trainer's model computed, on a bf16 base too."""
    with digits.steady_cpu():
        splits = digits.load_digits(0)
        base = digits.pretrain(0, splits["train"]).to(torch.bfloat16)
        trainer = ContinualEBLoRATrainer(
            model=copy.deepcopy(base),
            args=make_arguments(tmp_path, max_steps=20, per_device_train_batch_size=32),
            peft_config=lora(exclude_modules=["classifier"]),
            train_dataset={name: splits["train"].transformed(transform) for name, transform in digits.TASKS.items()},
        )
        trainer.train()
        images = splits["test"].images.to(torch.bfloat16)
        with torch.no_grad():
            live = trainer.model.eval()(pixel_values=images).logits
            loaded = load_sequence(copy.deepcopy(base), tmp_path)(pixel_values=images).logits
        assert (live - loaded).abs().max() <= 2**-8 * live.abs().max()
