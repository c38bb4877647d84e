"""Rows of earlier tasks in the batches of later ones."""

import pytest
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, push_sequence
from eblora_hf.trainers.replay import Mixing, read_rows, write_rows

from ..published.conftest import server  # noqa: F401
from ..support.tiny import make_text_data
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, load_published, make_trainer

REPLAY = EBLoRAConfig(replay_fraction=0.25, replay_batch=3)


class Seen(list):
    """A collator that keeps what it is given."""

    def __call__(self, rows):
        self.append([tuple(row["input_ids"].tolist()) for row in rows])
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Rows(TorchDataset):
    """What a user's own data set class may be."""

    def __init__(self, data):
        self.rows = [data[i] for i in range(len(data))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("kind", ["datasets", "own class"])
def test_every_batch_of_a_later_task_has_rows_of_earlier_ones(tmp_path, kind):
    data = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two", "three"))}
    of = {tuple(row["input_ids"].tolist()): name for name, rows in data.items() for row in rows}
    seen = Seen()
    sets = data if kind == "datasets" else {name: Rows(rows) for name, rows in data.items()}
    trainer = make_trainer(tmp_path, train_dataset=sets, eblora_config=REPLAY, data_collator=seen)
    trainer.train()
    names = [[of[row] for row in batch] for batch in seen]
    assert {tuple(sorted(set(batch))) for batch in names if len(set(batch)) == 1} <= {("one",), ("two",), ("three",)}
    mixed = [batch for batch in names if len(set(batch)) > 1]
    assert mixed
    for batch in mixed:
        own, added = batch[:4], batch[4:]
        assert len(set(own)) == 1
        assert len(added) == 3
        assert set(added) <= {"one"} if own[0] == "two" else set(added) <= {"one", "two"}
    for name in data:
        kept = {tuple(row["input_ids"].tolist()) for row in load_from_disk(str(tmp_path / "replay" / name))}
        assert len(kept) == 6
        assert {of[row] for row in kept} == {name}


def test_interrupted_and_resumed_is_the_same(tmp_path):
    options = {"eblora_config": REPLAY, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "whole", **options).train()
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", callbacks=[InterruptAt("two", 5)], **options).train()
    make_trainer(tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))
    make_trainer(tmp_path / "without").train()
    with pytest.raises(AssertionError):
        assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "without"))


def test_nothing_of_it_is_pushed(server, tmp_path):  # noqa: F811
    make_trainer(tmp_path, eblora_config=REPLAY).train()
    assert (tmp_path / "replay/two").is_dir()
    push_sequence(tmp_path, "me/seq")
    assert not [name for name in server.repos["me/seq"].resolve("main").files if "replay" in name]


def test_tasks_without_rows_are_named(tmp_path, caplog):
    make_trainer(tmp_path, tasks=("one",)).train()
    make_trainer(tmp_path, tasks=("two",), eblora_config=REPLAY, sequence=tmp_path).train()
    assert "no rows of one lie in" in caplog.text


def test_a_loader_that_mixes_nothing_in_is_refused(tmp_path):
    class OwnLoader(ContinualEBLoRATrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=4)

    class Above(ContinualEBLoRATrainer):
        def get_train_dataloader(self):
            return super().get_train_dataloader()

    with pytest.raises(ValueError, match="`get_train_dataloader` is overridden"):
        make_trainer(tmp_path / "own", cls=OwnLoader, eblora_config=REPLAY).train()
    make_trainer(tmp_path / "own", cls=OwnLoader).train(resume_from_checkpoint=True)  # as the message says
    make_trainer(tmp_path / "above", cls=Above, eblora_config=REPLAY).train()


@pytest.mark.parametrize("row", [(1, 2), {"x": torch.ones(2, dtype=torch.bfloat16)}], ids=["tuple", "bf16"])
def test_rows_that_cannot_be_kept_are_refused_before_anything_is_learnt(tmp_path, row):
    with pytest.raises(ValueError, match="of the task 'one'"):
        make_trainer(tmp_path, train_dataset={"one": Rows([row] * 8)}, eblora_config=REPLAY)
    assert not list(tmp_path.iterdir())


def test_batches_by_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' is not supported"):
        make_trainer(tmp_path, train_sampling_strategy="group_by_length", eblora_config=REPLAY)


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        {
            "text": f"row {i}",
            "numbers": [i, i + 1],
            "label": torch.tensor(i),
            "small": torch.tensor(i, dtype=torch.int32),
            "image": torch.full((1, 2, 2), i / 3),
            "bytes": torch.full((2, 2), i, dtype=torch.uint8),
            "exact": torch.full((2,), i / 3, dtype=torch.float64),
        }
        for i in range(3)
    ]
    write_rows(tmp_path / "rows", rows)
    write_rows(tmp_path / "rows", rows)  # a run that is repeated
    for row, again in zip(rows, read_rows(tmp_path / "rows"), strict=True):
        assert (again["text"], list(again["numbers"])) == (row["text"], row["numbers"])
        for name in ("label", "small", "image", "bytes", "exact"):
            assert again[name].dtype == row[name].dtype, name
            assert torch.equal(again[name], row[name]), name
    assert read_rows(tmp_path / "none") == []
    with pytest.raises(ValueError, match=r"rows that are dicts, but those for .* are tuple objects"):
        write_rows(tmp_path / "rows", [(1, 2)])


def test_which_rows_are_added_depends_on_the_batch_alone():
    rows = list(Dataset.from_dict({"x": range(100)}))
    first, again = (Mixing(lambda batch: [row["x"] for row in batch], rows, 5, seed=1) for _ in range(2))
    batch = [(7, {"x": -1}), (9, {"x": -2})]
    first([(1, {"x": -3})])
    assert first(batch) == again(batch)
    assert first(batch)[:2] == [-1, -2]
    assert len(set(map(tuple, (first([(i, {"x": 0})]) for i in range(20))))) > 10


@pytest.mark.parametrize(
    "options", [{"replay_fraction": 1.0}, {"replay_batch": 0}, {"replay_fraction": 0.1, "heads": "grow"}]
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EBLoRAConfig(**options)
