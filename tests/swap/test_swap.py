"""
The promise: change the import, add `peft_config`, and the script works; what it saves needs nothing of this package.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def write_csv(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in (("train", 64), ("validation", 24)):
        rows = ["text,label"]
        for _ in range(size):
            label = int(rng.integers(2))
            word = rng.choice([["bad", "awful"], ["good", "fine"]][label])
            rows.append(f"the {rng.choice(['film', 'book'])} was very {word},{label}")
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")


LOAD_WITHOUT_US = """
    import sys
    sys.modules["eblora_hf"] = None  # importing it fails, as where it is not installed
    try:
        import eblora_hf
        raise SystemExit("eblora_hf can be imported")
    except ImportError:
        pass
    import numpy as np, torch
    from torch.nn.functional import pad
    from peft import PeftModel
    source, stop = open({script!r}).read(), "lora_config ="
    sys.argv = ["script", {folder!r}]
    exec(source[: source.index(stop)].replace("set_seed(0)", "from transformers import set_seed; set_seed(0)"))
    model = PeftModel.from_pretrained(model, {folder!r} + "/out").eval()
    with torch.no_grad():
        {outputs}
    expected = np.load({folder!r} + "/logits.npy")
    mask = expected != -100
    print("difference", np.abs(outputs.numpy() - expected)[mask].max())
    assert np.abs(outputs.numpy() - expected)[mask].max() < 1e-5
"""


PADDED = """rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
        inputs = tokenizer.pad(rows, return_tensors="pt")
"""
# by script: the trainer it imports, what it prints, and how stock PEFT gives what it predicts
SWAPS = {
    "text_classification": (
        "Trainer",
        "eval_accuracy",
        f'rows = data["validation"]; {PADDED}        outputs = model(**inputs).logits',
    ),
    "causal_lm": (
        "Trainer",
        "perplexity",
        f"rows = data.select(range(6)); {PADDED}        outputs = model(**inputs).logits",
    ),
    "image_classification": (
        "Trainer",
        "eval_accuracy",
        'outputs = model(**collate([row for row in data["test"]])).logits',
    ),
    "summarization": (
        "Seq2SeqTrainer",
        "eval_rouge1",
        f"rows = data.select(range(6)); {PADDED}        "
        "made = model.generate(**inputs, max_length=6); "
        "outputs = pad(made, (0, 20 - made.shape[1]))",  # as Seq2SeqTrainer pads
    ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_one_line_swap(tmp_path, name):
    trainer, printed, outputs = SWAPS[name]
    write_csv(tmp_path)
    source = (SCRIPTS / f"{name}.py").read_text()
    plain = tmp_path / "plain.py"
    plain.write_text(source)
    run(plain, str(tmp_path))  # the script itself is sound
    swapped = tmp_path / "swapped.py"
    ours = trainer.replace("Seq2Seq", "ContinualEBLoRASeq2Seq") if "Seq2Seq" in trainer else "ContinualEBLoRATrainer"
    text = source.replace(f"    {trainer},\n", "").replace(
        "folder = Path", f"from eblora_hf import {ours} as {trainer}\n\nfolder = Path", 1
    )
    text = text.replace("    model=model,\n", "    model=model,\n    peft_config=lora_config,\n")
    swapped.write_text(text.replace('"out"', '"swapped"'))
    assert printed in run(swapped, str(tmp_path)).stdout
    (tmp_path / "out").rename(tmp_path / "plain_out")
    (tmp_path / "swapped").rename(tmp_path / "out")
    assert (tmp_path / "out" / "eblora_sequence.json").is_file()
    load = tmp_path / "load.py"
    code = textwrap.dedent(LOAD_WITHOUT_US.replace("{outputs}", textwrap.dedent(outputs)))
    load.write_text(code.replace("{script!r}", repr(str(plain))).replace("{folder!r}", repr(str(tmp_path))))
    assert "difference" in run(load).stdout
