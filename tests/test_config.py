import pytest
from transformers import HfArgumentParser, TrainingArguments

from eblora_hf import EBLoRAConfig, Task, TaskSequence


def test_command_line_and_yaml(tmp_path):
    parser = HfArgumentParser((TrainingArguments, EBLoRAConfig))
    _, config = parser.parse_args_into_dataclasses(["--output_dir", "o", "--direction_lr", "0.3", "--method", "ebo"])
    assert (config.direction_lr, config.scale_lr, config.method) == (0.3, "auto", "ebo")
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: o\nscale_lr: 0.02\nnum_layers: 12\nscale_weight_decay: 1e-3\n")
    _, config = parser.parse_yaml_file(str(path))
    assert (config.direction_lr, config.scale_lr, config.num_layers) == ("auto", 0.02, 12)
    assert config.scale_weight_decay == 1e-3  # which YAML reads as text
    words = ["--output_dir", "o", "--basis_from", "token-gradients", "--energy_threshold", "0.9"]
    _, config = parser.parse_args_into_dataclasses(words)
    assert (config.basis_from, config.energy_threshold) == ("token-gradients", 0.9)
    assert EBLoRAConfig(energy_threshold="9e-1").energy_threshold == 0.9
    for words in (["--method", "magic"], ["--basis_from", "weights"]):
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--output_dir", "o", *words])


def test_every_option_is_described():
    help_text = HfArgumentParser(EBLoRAConfig).format_help()
    for name in vars(EBLoRAConfig()):
        assert f"--{name}" in help_text
        assert name in EBLoRAConfig.__doc__


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "method='magic'.*expected one of eblora, ebo, lora"),
        ({"direction_lr": "fast"}, "direction_lr='fast'.*positive number or 'auto'"),
        ({"scale_lr": 0}, "scale_lr=0"),
        ({"energy_threshold": 99}, r"energy_threshold=99.*share in \(0, 1\]"),
        ({"snapshot_fraction": 0.0}, "snapshot_fraction=0.0"),
        ({"init_scale_alpha": -0.1}, "init_scale_alpha=-0.1.*at least 0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"step_constant": "big"}, "step_constant='big'.*expected a number"),
    ],
)
def test_bad_options_are_repeated_in_the_error(options, words):
    with pytest.raises(ValueError, match=words):
        EBLoRAConfig(**options)


def test_presets():
    ucit, dcl = EBLoRAConfig.preset("ucit"), EBLoRAConfig.preset("mllm-dcl")
    assert ucit.step_scaling == dcl.step_scaling == "rank"
    assert (ucit.init_scale_alpha, ucit.init_scale_beta) == (0.0, 0.0)
    assert (dcl.init_scale_alpha, dcl.init_scale_beta) == pytest.approx((5 * 0.002, 5 * 0.006))  # γ = 5
    published = EBLoRAConfig.preset("published")
    assert (published.basis_from, published.penalty_weight, published.step_scaling) == (
        "gradients",
        0.0,
        "dimensionless",
    )
    with pytest.raises(ValueError, match="'published', 'ucit' or 'mllm-dcl'"):
        EBLoRAConfig.preset("imagenet")


def test_sequences():
    sequence = TaskSequence({"a": [1], "b": [2]})
    assert sequence.names == ["a", "b"]
    assert [task.train_dataset for task in sequence] == [[1], [2]]
    with pytest.raises(ValueError, match="Two tasks are named 'A'"):
        TaskSequence([Task("a", [1]), Task("A", [1])])
    with pytest.raises(ValueError, match="at least one task"):
        TaskSequence([])
    with pytest.raises(TypeError, match="made of Task objects, got list"):
        TaskSequence([[1]])


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", ".hidden", "a b", "x" * 65, "é", None, "trailing."])
def test_task_names_are_safe_folder_names(name):
    with pytest.raises(ValueError, match="not a safe folder name"):
        Task(name, [1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_train_epochs": 1, "max_steps": 2}, "sets both"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"scale_lr": "slow"}, "scale_lr='slow'"),
        ({"train_dataset": None}, "has no training set"),
    ],
)
def test_bad_task_overrides(options, words):
    with pytest.raises(ValueError, match=words):
        Task(**({"name": "a", "train_dataset": [1]} | options))


def test_none_stays_allowed_after_a_parser_has_read_the_fields():
    """HfArgumentParser changes the types of a dataclass's fields in place."""
    from transformers import HfArgumentParser

    HfArgumentParser((EBLoRAConfig,))
    assert EBLoRAConfig(basis_budget=None, basis_from=None).basis_budget is None
