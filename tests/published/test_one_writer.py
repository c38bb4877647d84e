"""One writer a folder, and nothing written that could not be read."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence
from eblora_hf.memory.basis import BasisExtension
from eblora_hf.published.files import write
from eblora_hf.published.index import INDEX
from eblora_hf.published.locks import one_writer

from ..support.children import run_in_child
from ..support.sequences import LAYER, adapter, append, new_sequence
from ..support.tiny import lora, make_text_data
from ..support.trainers import make_trainer


def in_child(folder, code):
    """Whether a function of the opened sequence succeeds in another process."""
    return run_in_child(lambda: code(PublishedSequence.open(folder))) == 0


# ---- one writer ----


def test_a_sequence_that_another_process_has_changed_is_not_overwritten(tmp_path, silent):
    append(new_sequence(tmp_path), "one", 0)
    mine = PublishedSequence.open(tmp_path)
    assert in_child(tmp_path, lambda theirs: append(theirs, "theirs", 1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"Another process has changed .*the tasks one, theirs, and had one"):
        append(mine, "mine", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    append(PublishedSequence.open(tmp_path), "mine", 2)
    assert PublishedSequence.open(tmp_path).names == ["one", "theirs", "mine"]


def test_two_processes_that_append_at_once(tmp_path):
    """Both are kept, or one is told; the folder stays whole and takes further tasks."""
    append(new_sequence(tmp_path), "one", 0)
    children = {}
    for seed, name in enumerate(("x", "y"), start=1):
        child = os.fork()
        if child == 0:
            try:
                append(PublishedSequence.open(tmp_path), name, seed)
                os._exit(0)
            except ValueError:
                os._exit(1)
        children[name] = child
    told = {name for name, child in children.items() if os.waitpid(child, 0)[1] == 0}
    published = PublishedSequence.open(tmp_path)
    assert set(published.names) == {"one"} | told
    append(published, "z", 2)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_run_in_one_folder_is_refused(tmp_path, silent):
    def run():
        with pytest.raises(ValueError, match="Another process is writing into"):
            make_trainer(tmp_path).train()

    with one_writer(tmp_path, "run"):
        assert run_in_child(run) == 0
    make_trainer(tmp_path).train()


def test_a_link_in_place_of_a_temporary_file_leads_nowhere(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".file.tmp").symlink_to(outside)
    write(folder / "file", b"theirs")
    assert outside.read_text() == "mine"
    assert (folder / "file").read_bytes() == b"theirs"


def test_an_older_trainer_does_not_roll_the_sequence_back(tmp_path):
    older = make_trainer(tmp_path, tasks=("one",))
    older.train()
    make_trainer(tmp_path, tasks=("two",), sequence=tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"Another process has changed .*the tasks one, two, and had one"):
        older.save_model()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- what is written can be read ----


def test_names_that_differ_in_case_only_are_refused_before_training(tmp_path):
    make_trainer(tmp_path, tasks=("One",)).train()

    class NotOneStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise AssertionError("it trains")

    with pytest.raises(ValueError, match=r"already has a task 'One'.*'one'"):
        make_trainer(tmp_path, tasks=("one",), sequence=tmp_path, callbacks=[NotOneStep()]).train()
    assert PublishedSequence.open(tmp_path).names == ["One"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metrics": {"one": math.nan}}, r"tasks\.0\.metrics\.one: .* finite number, got nan"),
        ({"metrics": {"one": "good"}}, r"tasks\.0\.metrics\.one: .*'good'"),
        ({"steps": 2.5}, r"tasks\.0\.steps: .*integer.*2\.5"),
        ({"steps": -1}, r"tasks\.0\.steps: .*-1"),
        ({"training": {"loss": math.inf}}, "not JSON compliant"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, changed, words):
    sequence = new_sequence(tmp_path)
    values = {"steps": 5, "metrics": {"one": 0.5}, "training": {}} | changed
    with pytest.raises(ValueError, match=words):
        sequence.append("one", adapter(0), lora(target_modules=["query"]), {}, **values)
    assert not (tmp_path / INDEX).exists()
    append(sequence, "one", 0)
    assert PublishedSequence.open(tmp_path).names == ["one"]


# ---- finite or nothing ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_appended(tmp_path, value):
    sequence = new_sequence(tmp_path)
    broken = {key: torch.full_like(tensor, value) for key, tensor in adapter(0).items()}
    options = {"steps": 5, "metrics": {}, "training": {}}
    with pytest.raises(ValueError, match=rf"'one' has diverged: .*{LAYER}.*learning rate"):
        sequence.append("one", broken, lora(target_modules=["query"]), {}, **options)
    extension = {LAYER: BasisExtension(torch.full((32, 2), value), 0.99)}
    with pytest.raises(ValueError, match=f"the basis of {LAYER} is not finite"):
        sequence.append("one", adapter(0), lora(target_modules=["query"]), extension, **options)
    assert not (tmp_path / INDEX).exists()


class OneBadLoss(ContinualEBLoRATrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss * math.nan if model.training and self.state.global_step == 1 else loss


@pytest.mark.parametrize("method", ["lora", "ebo", "olora", "eblora"])
def test_a_run_that_diverges_publishes_nothing(tmp_path, method):
    with pytest.raises(
        (ValueError, RuntimeError), match=r"'one' has diverged: .*lora_A.weight is not finite.*that of step 2"
    ):
        make_trainer(tmp_path, cls=OneBadLoss, eblora_config=EBLoRAConfig(method=method)).train()
    for path in tmp_path.glob("**/adapter_model.safetensors"):
        assert "checkpoints" in path.parts or all(torch.isfinite(x).all() for x in load_file(path).values())
    assert not PublishedSequence.exists(tmp_path)


# ---- trained means published ----


def test_trainable_base_weights_are_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path / "unused")
    model = trainer.model
    model.get_base_model().bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight for one.*modules_to_save"):
        make_trainer(tmp_path, model=model, peft_config=None, train_dataset=make_text_data("bert"))
