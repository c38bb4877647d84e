"""Opening a sequence without a trainer: what is continued, and what is refused."""

import contextlib

import pytest

from eblora_hf import PublishedSequence
from eblora_hf.trainers.opening import check_bases, open_sequence

from ..support.sequences import LAYER, append, new_sequence
from ..support.tiny import make_model


def opened(folder, source=None, tasks=("three",), layers=(LAYER,), **options):
    return open_sequence(folder, source, make_model("bert"), list(tasks), list(layers), **options)


@pytest.fixture
def two_tasks(tmp_path):
    sequence = new_sequence(tmp_path / "two")
    append(sequence, "one", 0)
    append(sequence, "two", 1)
    return sequence.folder


def test_a_new_sequence_writes_nothing_yet(tmp_path):
    published = opened(tmp_path / "new")
    assert published.tasks == []
    assert not (tmp_path / "new").exists()


def test_a_sequence_is_continued_in_place_or_elsewhere(tmp_path, two_tasks):
    assert opened(two_tasks, two_tasks).names == ["one", "two"]
    elsewhere = opened(tmp_path / "copy", two_tasks)
    assert elsewhere.folder == tmp_path / "copy"
    assert PublishedSequence.open(tmp_path / "copy").names == ["one", "two"]


def test_what_lies_there_is_not_continued_by_accident(tmp_path, two_tasks):
    with pytest.raises(ValueError, match=r"already holds a sequence.*resume_from_checkpoint=True"):
        opened(two_tasks)
    assert opened(two_tasks, resuming=True).names == ["one", "two"]
    with pytest.raises(ValueError, match=r"already has the task\(s\) two"):
        opened(two_tasks, two_tasks, tasks=("two",))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened(tmp_path / "new", tmp_path / "nowhere")


def test_another_model_and_other_layers_are_refused(two_tasks):
    with pytest.raises(ValueError, match="weights have other values"):
        open_sequence(two_tasks, two_tasks, make_model("bert", seed=1), ["three"], [LAYER])
    with pytest.raises(ValueError, match=r"differ in .*another"):
        opened(two_tasks, two_tasks, layers=(LAYER, "another"))


def test_processes_wait_before_one_writes_and_before_all_read(tmp_path, two_tasks):
    events = []
    folder = tmp_path / "copy"

    @contextlib.contextmanager
    def together(doing):
        yield
        events.append(PublishedSequence.exists(folder))  # here a process waits for the others

    opened(folder, two_tasks, together=together)
    assert events == [False, True]


def test_tasks_without_bases_are_named(tmp_path, two_tasks):
    check_bases(PublishedSequence.open(two_tasks), "eblora")
    sequence = new_sequence(tmp_path / "bare")
    append(sequence, "one", 0, extensions=None)
    with pytest.raises(ValueError, match=r"The task\(s\) one .* keeps no basis"):
        check_bases(sequence, "eblora")
