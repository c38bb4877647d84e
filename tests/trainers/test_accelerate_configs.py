"""The configurations for `accelerate launch` that ship with the scripts."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from eblora_hf import EBLoRAConfig
from eblora_hf.trainers.fsdp import ShardedMixin

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "accelerate_configs"


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch` sets for every process."""
    arguments = ["--config_file", str(CONFIGS / name), "--main_process_port", "29510", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert args.num_processes == 2
    before = dict(os.environ)
    try:
        return {key: value for key, value in prepare_multi_gpu_env(args).items() if before.get(key) != value}
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_multi_gpu():
    found = environment("multi_gpu.yaml")
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in found


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (None, None, None),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "cpu_ram_efficient_loading is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "activation_checkpointing is not supported.*gradient_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "true", "cpu_offload is not supported"),
    ],
)
def test_fsdp2_is_what_the_trainer_accepts(monkeypatch, variable, value, words):
    found = environment("fsdp2.yaml")
    assert found["ACCELERATE_USE_FSDP"] == "true"
    for key, setting in (found | ({variable: value} if variable else {})).items():
        monkeypatch.setenv(key, setting)
    plugin = FullyShardedDataParallelPlugin()
    trainer = ShardedMixin()
    trainer.__dict__ |= {
        "is_deepspeed_enabled": False,
        "is_fsdp_enabled": True,
        "accelerator": SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        "args": SimpleNamespace(torch_compile=False, fsdp=True),
        "eblora_config": EBLoRAConfig(),
        "layers": [],
    }
    if words is None:
        trainer.check_sharding()
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    else:
        with pytest.raises(ValueError, match=words):
            trainer.check_sharding()


def test_accelerate_launch_runs_a_script(tmp_path):
    """On this machine in one process: `accelerate launch --cpu` starts no more."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from tests.support.contract import keep_contract\n"
        "assert os.environ['ACCELERATE_USE_CPU'].lower() == 'true'\n"
        "keep_contract('Llama', 'float32', Path('.'))\n"
        "print('the contract is kept')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "the contract is kept" in result.stdout, result.stderr[-2000:]
