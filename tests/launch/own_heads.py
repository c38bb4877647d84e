"""Tasks with labels of their own, in the processes that `torchrun` starts: arguments are JSON."""

import json
import sys

from datasets import ClassLabel

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig
from tests.support.tiny import accuracy, lora, make_arguments, make_model, make_text_data


def main(folder: str, heads: str, per_device: int) -> None:
    sets = {}
    for seed, labels in enumerate((["x", "y", "z"], ["p", "q"], ["u", "v", "w"])):
        data = make_text_data("bert", seed=seed).with_format(None)
        numbers = [row[0] % len(labels) for row in data["input_ids"]]
        data = data.remove_columns("labels").add_column("labels", numbers)
        sets[f"t{seed}"] = data.cast_column("labels", ClassLabel(names=labels)).with_format("torch")
    ContinualEBLoRATrainer(
        model=make_model("bert"),
        args=make_arguments(folder, max_steps=8, per_device_train_batch_size=per_device),
        peft_config=lora(),
        train_dataset=sets,
        eval_dataset=sets,
        compute_metrics=accuracy,
        eblora_config=EBLoRAConfig(heads=heads),
    ).train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
