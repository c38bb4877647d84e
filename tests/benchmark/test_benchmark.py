"""The embedded benchmark: its data, its command line, and (slow) what the methods reach."""

import copy
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eblora_hf import ContinualEBLoRATrainer, __version__, load_sequence
from eblora_hf.benchmark import digits, transformations
from eblora_hf.benchmark.plots import plot_matrices
from eblora_hf.benchmark.protocol import MethodResult, run_method
from eblora_hf.benchmark.report import by_method, markdown, paired_rows, save_results
from eblora_hf.benchmark.runs import Run, read_results, run_all
from eblora_hf.benchmark.suites import SUITES
from eblora_hf.benchmark.transformations import PROTOCOL_TASKS, TRANSFORMATIONS, transformation
from eblora_hf.benchmark.tuning import grid_of, tune
from eblora_hf.cli import app
from eblora_hf.published.files import tensor_bytes, write

from ..support.tiny import lora, make_arguments

ROOT = Path(__file__).parents[2]
DIGITS = SUITES["digits"]
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
    of = {name: transform(ramp) for name, transform in TRANSFORMATIONS.items()}
    assert torch.equal(of["swap-columns"][..., 0], ramp[..., 1])
    assert torch.equal(transformations.swap_columns(of["swap-columns"]), ramp)
    assert torch.equal(of["swap-rows"][..., 0, :], ramp[..., 1, :])
    assert torch.equal(of["invert-left"][..., :4], -ramp[..., :4])
    assert torch.equal(of["invert-left"][..., 4:], ramp[..., 4:])
    assert torch.equal(of["invert-top"][..., :4, :], -ramp[..., :4, :])
    assert torch.equal(of["invert-top"][..., 4:, :], ramp[..., 4:, :])
    assert (of["grid"][..., ::4, :] == 0.7).all()
    assert (of["grid"][..., :, ::4] == 0.7).all()
    assert torch.equal(of["grid"][..., 1, 1], ramp[..., 1, 1])
    assert ((of["dots"] == 0.7).sum() - (ramp == 0.7).sum()) == 9
    torch.testing.assert_close(transformation("rotate-90")(ramp), torch.rot90(ramp, 1, (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(transformation("rotate--90")(ramp), torch.rot90(ramp, -1, (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(transformation("rotate-0")(ramp), ramp, atol=1e-5, rtol=0)
    torch.testing.assert_close(transformation("rotate-60.0")(ramp), of["rotate-60"])
    torch.testing.assert_close(transformations.shear(ramp, 0.0), ramp, atol=1e-5, rtol=0)
    torch.testing.assert_close(transformations.zoom(ramp, 1.0), ramp, atol=1e-5, rtol=0)
    torch.testing.assert_close(of["zoom-in"][..., 3:5, 3:5].mean(), ramp.mean(), atol=1e-5, rtol=0)
    assert of["zoom-out"][..., 0, 0] == -1.0  # background
    assert of["dim"].amax() == pytest.approx(-0.4)
    assert transformations.edges(ramp).amax() == pytest.approx(1.0)
    assert transformations.edges(torch.full((1, 1, 8, 8), 0.3)).unique().tolist() == [-1.0]
    assert sorted(of["permute"].flatten().tolist()) == ramp.flatten().tolist()
    assert torch.equal(of["flip-horizontal"].flip(-1), ramp)
    assert torch.equal(of["transpose"][..., 0, 1], ramp[..., 1, 0])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_are_functions_of_the_images_alone(name):
    images = digits.load_digits(0)["test"].images[:8]
    before = images.clone()
    once = transformation(name)(images)
    assert once.shape == images.shape
    assert torch.equal(images, before)
    assert torch.equal(once, transformation(name)(images))
    assert torch.isfinite(once).all()
    others = [other for other in TRANSFORMATIONS if other != name]
    assert not any(torch.allclose(once, transformation(other)(images), atol=1e-3) for other in others)


def test_unknown_transformations_are_named():
    for name in ("rotate", "rotate-", "rotate-x", "blur", ""):
        with pytest.raises(ValueError, match=r"no transformation.*rotate-<degrees>.*permute"):
            transformation(name)
    assert len(TRANSFORMATIONS) >= 16
    assert PROTOCOL_TASKS == ("rotate-60", "invert-left", "shear", "edges", "swap-columns", "grid")


def a_result() -> MethodResult:
    matrix = (np.arange(36).reshape(6, 6) * 2.0).tolist()
    return MethodResult(50.0, 60.0, float("nan"), 70.0, 20.0, 90.0, matrix, [1.0, 0.5, 0.2, 0.1])


def test_json_and_plot(tmp_path):
    save_results({"lora": a_result(), "eblora": a_result()}, 3, tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seed"] == 3
    assert torch.__version__.startswith(content["versions"]["torch"])  # builds for CUDA add to it
    assert set(content["methods"]["eblora"]) == {
        "MFN", "MAA", "BWT", "LA", "FWT", "base", "accuracy_matrix", "sigma_ratio", "similarity", "room", "megabytes",
        "seconds",
    }  # fmt: skip
    assert content["methods"]["lora"]["BWT"] is None
    matrices = {name: a_result().accuracy_matrix for name in ("lora", "ebo", "eblora", "osf", "olora")}
    plot_matrices(
        matrices | {"joint": matrices["lora"][:1]},
        dict.fromkeys([*matrices, "joint"], ""),
        PROTOCOL_TASKS,
        tmp_path / "plot.png",
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_line():
    assert runner.invoke(app, ["--version"]).output == f"eblora_hf {__version__}\n"
    assert "demo" in runner.invoke(app, ["--help"]).output
    wrong = runner.invoke(app, ["demo", "--methods", "lora,magic"])
    assert wrong.exit_code == 2
    assert "lora,magic" in wrong.output
    assert runner.invoke(app, ["demo", "--methods", "lora,lora"]).exit_code == 2
    assert runner.invoke(app, ["demo", "--seed", "-1"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "lora,magic"], "lora, magic"),
        (["--methods", ""], "expected different names"),
        (["--seeds", "0,1,1"], "none of them twice"),
        (["--seeds", "four"], "four"),
        (["--seeds", "4-2"], "at least one"),
        (["--tasks", "rotate-60,blur"], "blur"),
        (["--tasks", "grid,grid"], "none of them twice"),
        (["--rank", "0"], "--rank"),
        (["--suite", "words"], "There is no suite 'words'"),
        (["--suite", "text", "--tasks", "grid"], "no task 'grid'"),
        (["--suite", "text-grow", "--methods", "frozen"], "expected different names"),
    ],
)
def test_wrong_words_to_the_benchmark(tmp_path, arguments, words):
    result = runner.invoke(app, ["benchmark", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())  # the terminal wraps
    assert list(tmp_path.iterdir()) == []


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


# ---- many runs ----


def a_line(method: str, seed: int, mfn: float, **changes) -> dict:
    run = Run("digits", method, seed, ("grid", "dots"), 4, {"learning_rate": 1e-3})
    result = {"MFN": mfn, "MAA": 60.0, "BWT": None, "LA": 70.0, "FWT": 20.0, "base": 90.0, "similarity": None}
    result |= {"room": 50.0, "megabytes": 1.5, "seconds": 10.0}
    matrix = [[50.0, 10.0], [40.0, 60.0]]
    result |= {"accuracy_matrix": matrix, "sigma_ratio": [1.0], "base_model": "abc", "versions": {}}
    return run.describe() | result | changes


def test_summary_is_mean_and_standard_deviation_and_paired_by_seed():
    lines = [a_line("eblora", 0, 60.0), a_line("eblora", 1, 70.0)]
    lines += [a_line("lora", seed, mfn, BWT=-10.0) for seed, mfn in ((1, 52.0), (0, 50.0))]
    assert paired_rows(lines, "eblora") == [["lora", "+14.0±5.7", "+10.0 … +18.0"]]
    text = markdown(lines, "eblora")
    assert "| eblora | 65.0±7.1 | 60.0±0.0 |  | 70.0±0.0 | 20.0±0.0 | 90.0±0.0 |" in text
    assert "| lora | learning_rate 0.001 |" in text
    assert "| eblora | 50.0±0.0 | 1.5±0.0 | 10.0±0.0 |" in text
    assert "similarity" not in text  # nobody has measured any
    assert "| lora | 51.0±1.4 | 60.0±0.0 | -10.0±0.0 | 70.0±0.0 |" in text
    assert "| eblora | 60.0 |" in markdown(lines[:1], "eblora")


def test_a_half_written_line_is_taken_off_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    whole = [json.dumps(a_line("lora", seed, 50.0)) + "\n" for seed in (0, 1)]
    path.write_text(whole[0] + whole[1][:40])
    assert [line["seed"] for line in read_results(path)] == [0]
    assert path.read_text() == whole[0]
    path.write_text(whole[0] + "{}\n" + whole[1])
    with pytest.raises(ValueError, match=r"Line 2 of .*results\.jsonl is not a result \(BWT.*method"):
        read_results(path)


def test_results_on_several_base_models_do_not_compare(tmp_path):
    """Neither in a file, nor when a run on another processor would add to it; before anything is run."""
    path, bases = tmp_path / "results.jsonl", tmp_path / "base_models"
    lines = [a_line("lora", 0, 50.0), a_line("ebo", 0, 50.0, base_model="def"), a_line("ebo", 1, 50.0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"results\.jsonl has results of seed 0 on another base model \(def… of ebo"):
        read_results(path)
    path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[2]) + "\n")
    assert len(read_results(path)) == 2
    torch.manual_seed(0)
    write(bases / "seed-0.safetensors", tensor_bytes(digits.new_model().state_dict()))
    path.write_text("")
    (line,) = run_all([Run("digits", "frozen", 0, ("grid",), 4)], path, bases, workers=1)
    torch.manual_seed(1)  # as another processor would train it
    write(bases / "seed-0.safetensors", tensor_bytes(digits.new_model().state_dict()))
    with pytest.raises(ValueError, match=rf"seed 0 on another base model \({line['base_model'][:12]}… of frozen"):
        run_all([Run("digits", "frozen", 0, ("dots",), 4)], path, bases, workers=1)
    assert read_results(path) == [line]


def test_results_of_other_versions_are_not_taken(tmp_path, monkeypatch):
    """Nor is a damaged base model without a word."""
    run = Run("digits", "frozen", 0, ("grid",), 4)
    bases = tmp_path / "base_models"
    write(bases / "seed-0.safetensors", tensor_bytes(digits.new_model().state_dict()))
    (first,) = run_all([run], tmp_path / "results.jsonl", bases, workers=1)
    old = first | {"versions": first["versions"] | {"torch": "1.0"}, "MFN": 0.0}
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    (again,) = run_all([run], tmp_path / "results.jsonl", bases, workers=1)
    assert again | {"seconds": 0} == first | {"seconds": 0}
    (bases / "seed-0.safetensors").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"seed-0\.safetensors is damaged.*delete it"):
        run_all([run], tmp_path / "other.jsonl", bases, workers=1)


def test_every_method_is_tuned_on_as_many_settings():
    for suite in SUITES.values():
        assert {len(grid_of(suite, method)) for method in suite.tuning} == {8}
        assert set(suite.methods) - {"frozen"} == set(suite.tuning)
        for method, content in suite.tuning.items():
            assert content["tuned"] in grid_of(suite, method)


def test_tuning_takes_the_best_mean_on_validation(tmp_path, monkeypatch):
    seen = []

    def fake(runs, path, bases, workers, done):
        seen.extend(runs)
        return [
            run.describe() | {"MFN": 50.0 + 10.0 * (run.settings["learning_rate"] == 2e-3) + run.seed % 2}
            for run in runs
        ]

    monkeypatch.setattr("eblora_hf.benchmark.tuning.run_all", fake)
    best = tune(DIGITS, ["frozen", "lora"], ("grid",), 4, tmp_path, tmp_path, 1)
    assert best == {"lora": {"learning_rate": 2e-3}}
    assert {run.measured_on for run in seen} == {"validation"}
    assert {run.seed for run in seen} == {100, 101}


def test_the_readme_shows_the_committed_results():
    """README and summary are what the committed lines say, and they say what is claimed of them."""
    folder = ROOT / "benchmarks" / "digits"
    lines = read_results(folder / "results.jsonl")
    summary = markdown(lines, "eblora")
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(row in readme for row in summary.split("| method | settings |")[0].splitlines() if row)
    of = {method: {run["seed"]: run for run in runs} for method, runs in by_method(lines).items()}
    assert {method: set(runs) for method, runs in of.items()} == {method: {0, 1, 2, 3, 4} for method in DIGITS.methods}
    mean = {method: np.mean([run["MFN"] for run in runs.values()]) for method, runs in of.items()}
    assert all(of["eblora"][seed]["MFN"] - of["lora"][seed]["MFN"] >= 8 for seed in range(5))
    assert mean["eblora"] - mean["lora"] >= 12
    assert mean["eblora"] - mean["ebo"] >= 9
    assert mean["eblora"] >= max(mean["keeplora"], mean["eblora-published"])
    least = {
        "eblora": {"MFN": 75, "BWT": -10, "base": 75},
        "eblora-random": {"MFN": 75, "BWT": -8, "base": 80},
        "eblora-anchor": {"MFN": 78, "BWT": -8, "base": 93},
    }
    for method, bars in least.items():
        for metric, bar in bars.items():
            assert np.mean([run[metric] for run in of[method].values()]) >= bar
    assert all(run["sigma_ratio"][-1] >= 0.999 for run in of["eblora"].values())
    assert all(run["sigma_ratio"][1] <= 0.6 for run in of["lora"].values())


def test_the_docs_show_the_committed_results():
    """Text, eighteen tasks and the ablations; and they say what is claimed of them."""
    page = (ROOT / "docs" / "what-holds.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    of = {}
    for name in ("text", "long"):
        folder = ROOT / "benchmarks" / name
        lines = read_results(folder / "results.jsonl")
        summary = markdown(lines, "eblora")
        assert (folder / "summary.md").read_text(encoding="utf-8") == summary
        table = summary.split("\n\n")[0]
        assert table in page
        of[name] = {method: {run["seed"]: run for run in runs} for method, runs in by_method(lines).items()}
        assert all(set(runs) == {0, 1, 2, 3, 4} for runs in of[name].values())
        if name == "text":
            assert table in readme
    ablations = (ROOT / "benchmarks" / "digits" / "ablations.md").read_text(encoding="utf-8")
    assert ablations in page
    text = of["text"]
    for method in ("eblora", "eblora-anchor"):
        gains = np.array([text[method][seed]["MFN"] - text["lora"][seed]["MFN"] for seed in range(5)])
        assert gains.min() > 1.5
        assert gains.mean() > 6
        assert gains.mean() > max(gains.std(ddof=1), np.std([text["lora"][s]["MFN"] for s in range(5)], ddof=1))
        assert all(text[method][seed]["LA"] >= text["lora"][seed]["LA"] - 2 for seed in range(5))
    assert all(text["eblora-anchor"][seed]["similarity"] > text["lora"][seed]["similarity"] for seed in range(5))
    mean = {method: np.mean([run["MFN"] for run in runs.values()]) for method, runs in of["long"].items()}
    assert mean["eblora-anchor"] > mean["eblora"] + 3 > mean["lora"] + 10


def test_an_anchor_keeps_93_percent_on_the_pre_training():
    """Every seed more than plain EBLoRA, and with drawn inputs more than 80."""
    lines = read_results(ROOT / "benchmarks" / "digits" / "results.jsonl")
    of = {method: {run["seed"]: run["base"] for run in runs} for method, runs in by_method(lines).items()}
    assert np.mean(list(of["eblora-anchor"].values())) >= 93
    assert np.mean(list(of["eblora-random"].values())) >= 80
    assert all(of["eblora-anchor"][seed] >= of["eblora"][seed] + 10 for seed in range(5))


@pytest.mark.slow
def test_the_benchmark_runs_in_processes_and_resumes(tmp_path):
    """Two tasks, three methods, two seeds; a second call makes only what a kill left out, and finds the same."""
    words = ["benchmark", "--methods", "frozen,eblora,joint", "--seeds", "0-1", "--tasks", "rotate--45,dots",
             "--rank", "2", "--output", str(tmp_path)]  # fmt: skip
    first = runner.invoke(app, words)
    assert first.exit_code == 0, first.output
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    content = [json.loads(line) for line in lines]
    assert {(line["method"], line["seed"]) for line in content} == {
        (method, seed) for method in ("frozen", "eblora", "joint") for seed in (0, 1)
    }
    for line in content:
        assert line["tasks"] == ["rotate--45", "dots"]
        assert line["versions"]["torch"] == torch.__version__
        assert len(line["sigma_ratio"]) == {"frozen": 0, "eblora": 2, "joint": 4}[line["method"]]
    path.write_text("".join(lines[:4]) + lines[4][:100])
    second = runner.invoke(app, words)
    assert second.exit_code == 0, second.output
    again = [json.loads(line) for line in path.read_text().splitlines()]
    key = lambda line: (line["method"], line["seed"])  # noqa: E731
    for line in again + content:
        assert line.pop("seconds") > 0
    assert sorted(again, key=key) == sorted(content, key=key)
    for name in ("summary.md", "matrices.png", "mfn.png", "first_task.png", "spectra.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_failing_run_is_named_and_the_finished_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bases = tmp_path / "base_models"
    model = digits.new_model()
    write(bases / "seed-0.safetensors", tensor_bytes(model.state_dict()))
    runs = [Run("digits", "frozen", 0, ("grid",), 4), Run("digits", "lora", 0, ("grid",), 4, {"learning_rate": -1.0})]
    with pytest.raises(RuntimeError, match=r"The run «lora, seed 0, \{'learning_rate': -1\.0\}» failed"):
        run_all(runs, tmp_path / "results.jsonl", bases, workers=1)
    assert [line["method"] for line in read_results(tmp_path / "results.jsonl")] == ["frozen"]


@pytest.mark.slow
def test_methods_reach_what_they_should():
    """Seed 0: EBLoRA at least 12 points over LoRA, forgets little, balanced spectra; and it needs no tuning."""
    with digits.steady_cpu():
        splits = digits.load_digits(0)
        base = digits.pretrain(0, splits["train"])
        problem = digits.digits_problem(base, splits, PROTOCOL_TASKS)
        lora = run_method("lora", DIGITS, problem, 0)
        eblora = run_method("eblora", DIGITS, problem, 0)
        assert eblora.MFN - lora.MFN >= 12
        assert eblora.BWT >= -20
        assert lora.sigma_ratio[1] <= 0.6
        assert eblora.sigma_ratio[-1] >= 0.999
        for learning_rate in (2e-4, 5e-3):
            untuned = run_method("eblora", DIGITS, problem, 0, settings={"learning_rate": learning_rate})
            assert untuned.MFN >= eblora.MFN - 4
        again = run_method("eblora", DIGITS, problem, 0)
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
            train_dataset={
                name: splits["train"].transformed(transform)
                for name, transform in ((n, TRANSFORMATIONS[n]) for n in PROTOCOL_TASKS)
            },
        )
        trainer.train()
        images = splits["test"].images.to(torch.bfloat16)
        with torch.no_grad():
            live = trainer.model.eval()(pixel_values=images).logits
            loaded = load_sequence(copy.deepcopy(base), tmp_path)(pixel_values=images).logits
        assert (live - loaded).abs().max() <= 2**-8 * live.abs().max()
