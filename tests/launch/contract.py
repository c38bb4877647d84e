"""
Run by test_support.py under torchrun: keeps the contract for many models and precisions in the same processes.

The argument is JSON: `folder`, `launcher` ("torchrun" or "FSDP2"), and `cells`, a list of models and precisions. What
became of each is written to `results.json` as soon as it is known: "works", or the error.
"""

import json
import sys
import traceback
from pathlib import Path

import torch

from tests.launch.fsdp2 import FSDP2OnCPU
from tests.support.architectures import ARCHITECTURES
from tests.support.contract import keep_contract

options = json.loads(sys.argv[1])
folder, results = Path(options["folder"]), {}
torch.distributed.init_process_group("gloo")
for number, (model, precision) in enumerate(options["cells"]):
    sharded = type("Sharded", (FSDP2OnCPU,), {"blocks": ARCHITECTURES[model].blocks})
    before = (sharded,) if options["launcher"] == "FSDP2" else ()
    try:
        trainer = keep_contract(
            model, precision, folder / str(number), before, per_device_train_batch_size=2, ddp_backend="gloo"
        )
        result = "works"
    except ValueError as error:  # a refusal, on all processes
        result = str(error)
    except Exception:
        result = traceback.format_exc()
    results[f"{model} | {precision}"] = result
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
torch.distributed.destroy_process_group()
