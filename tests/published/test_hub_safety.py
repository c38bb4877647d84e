"""A Hub that does not answer, a second publisher, and what must not be made public or overwritten."""

import json
import re

import pytest
import torch
from huggingface_hub import HfApi

from eblora_hf import PublishedSequence, SequenceConflictError, load_sequence, push_sequence
from eblora_hf.published import requests
from eblora_hf.published.card import render_card
from eblora_hf.published.loading import fetch_sequence
from eblora_hf.published.owner import SETTINGS, remember
from eblora_hf.published.schema import MAX_INDEX

from ..support.children import run_script
from ..support.sequences import append, new_sequence
from ..support.tiny import make_model
from ..support.trainers import make_trainer

HUB = {"push_to_hub": True, "hub_model_id": "me/run"}


@pytest.fixture
def sequence(tmp_path):
    made = new_sequence(tmp_path / "out")
    append(made, "one", 0)
    append(made, "two", 1)
    return made


# ---- a Hub that does not answer ----


@pytest.mark.parametrize(
    "hanging", [r"POST .*/commit/", r"POST .*/preupload/", r"PUT /lfs", r"POST .*/create", r"GET .*refs"]
)
def test_training_goes_on(server, tmp_path, monkeypatch, caplog, hanging):
    monkeypatch.setattr(requests, "TIMEOUT", 1.0)
    HfApi().create_repo("me/run")
    requests.get_session().timeout = None  # as a process begins
    server.hanging = re.compile(hanging)
    trainer = make_trainer(tmp_path / "out", **HUB)
    trainer.train()
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]
    assert "could not be pushed to me/run" in caplog.text
    server.hanging = None
    server.release.set()
    trainer.push_to_hub()
    titles = [commit.title for commit in server.repos["me/run"].history("main")]
    assert titles == ["Add task-01-two", "Add task-00-one", "initial commit"]
    assert set(server.repos["me/run"].tags) == {"task-00-one", "task-01-two"}


def test_the_next_task_is_trained_while_a_push_hangs(server, tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "TIMEOUT", 600.0)
    server.hanging = re.compile("POST .*/commit/")
    requests.get_session().timeout = None
    trainer = make_trainer(tmp_path / "out", **HUB)
    learnt_while_hanging = []

    def finish(sequence):
        learnt_while_hanging.append(list(sequence.names))
        server.hanging = None
        server.release.set()
        original(sequence)

    original = trainer.publisher.finish
    trainer.publisher.finish = finish
    trainer.train()
    assert learnt_while_hanging == [["one", "two"]]
    assert len(server.repos["me/run"].tags) == 2


def test_a_loaded_sequence_loads_offline(server, sequence, tmp_path):
    push_sequence(sequence, "me/seq")
    fetch_sequence("me/seq")
    make_model("bert").save_pretrained(tmp_path / "base")
    script = """
        import torch, transformers
        from eblora_hf import load_sequence
        base = transformers.BertForSequenceClassification.from_pretrained("base")
        model = load_sequence(base, "me/seq")
        torch.save({name: x for name, x in model.state_dict().items() if "lora_" in name}, "found.pt")
        load_sequence(base, "me/never-fetched")
    """
    result = run_script(script, tmp_path, HF_HUB_OFFLINE="1")
    assert "offline" in result.stderr.splitlines()[-1].lower(), result.stderr  # what is not in the cache
    assert "The copy in the cache is taken" in result.stderr
    expected = load_sequence(make_model("bert"), sequence.folder).state_dict()
    found = torch.load(tmp_path / "found.pt")
    assert found
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_loaded_sequence_loads_from_a_hub_that_does_not_answer(server, sequence, monkeypatch, caplog):
    push_sequence(sequence, "me/seq")
    fetch_sequence("me/seq")
    monkeypatch.setattr(requests, "TIMEOUT", 1.0)
    requests.get_session().timeout = None
    server.hanging = re.compile("")
    assert fetch_sequence("me/seq").names == ["one", "two"]
    assert "The copy in the cache is taken" in caplog.text


# ---- one writer a repository ----


def commit_by_hand(repo, sequence):
    """As another publisher's process does it, all in one."""
    files = {name: (sequence.folder / name).read_bytes() for task in sequence.tasks for name in task.files}
    repo.commit("main", "theirs", repo.resolve("main").files | files | sequence.state_after(len(sequence.tasks)))


@pytest.fixture
def theirs(server, sequence, tmp_path):
    """The first task, and another second one."""
    push_sequence(PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:1]), "me/copy")
    grown = fetch_sequence("me/copy", folder=tmp_path / "theirs")
    append(grown, "theirs", 2)
    return grown


def names_on(server):
    index = json.loads(server.repos["me/seq"].resolve("main").files["eblora_sequence.json"])
    return [task["name"] for task in index["tasks"]]


def test_a_commit_that_changes_nothing_is_no_ground_to_build_on(server, sequence, theirs, monkeypatch):
    """
    Our first commit is taken and its answer lost. The second try finds nothing to change, and before it asks for the
    head, somebody else appends.
    """
    HfApi().create_repo("me/seq")
    server.lost_answers = 1
    repo, original = server.repos["me/seq"], HfApi.repo_info

    def repo_info(self, repo_id, *args, **kwargs):
        if repo.resolve("main").title == "Add task-00-one":
            commit_by_hand(repo, theirs)
        return original(self, repo_id, *args, **kwargs)

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    with pytest.raises(SequenceConflictError, match="changed while 'Add task-00-one' was being pushed"):
        push_sequence(sequence, "me/seq")
    assert names_on(server) == ["one", "theirs"]


def test_what_is_compared_is_what_is_built_on(server, sequence, theirs):
    """Somebody appends between our look at the repository and our first commit."""
    push_sequence(PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:1]), "me/seq")

    def somebody_else():
        server.before_commit = lambda: None
        commit_by_hand(server.repos["me/seq"], theirs)

    server.before_commit = somebody_else
    with pytest.raises(SequenceConflictError, match="changed while 'Add task-01-two' was being pushed"):
        push_sequence(sequence, "me/seq")
    assert names_on(server) == ["one", "theirs"]


# ---- what is not made public, and not overwritten ----


def change_bases(repo, bases):
    files = dict(repo.resolve("main").files)
    index = json.loads(files["eblora_sequence.json"]) | {"bases": bases}
    repo.commit("main", "a collaborator", files | {"eblora_sequence.json": json.dumps(index).encode()})


@pytest.mark.parametrize("first", [False, "me/bases"])
@pytest.mark.parametrize("changed", ["included", "me/elsewhere"])
def test_a_changed_index_does_not_make_bases_public(server, sequence, first, changed):
    part = PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:1])
    push_sequence(part, "me/seq", push_bases=first)
    repo = server.repos["me/seq"]
    change_bases(repo, changed)
    for push_bases in (None, first):
        with pytest.raises(ValueError, match=f"says that the bases are '{changed}'.*somebody has changed it"):
            push_sequence(sequence, "me/seq", push_bases=push_bases)
    assert not [
        name
        for repo in server.repos.values()
        for name in repo.resolve("main").files
        if "subspace" in name and not repo.private
    ]


def test_where_bases_go_is_kept_by_a_copy_as_well(server, sequence, tmp_path):
    push_sequence(sequence, "me/seq", push_bases="me/bases")
    copy = fetch_sequence("me/seq", folder=tmp_path / "copy")
    append(copy, "three", 2)
    repo = server.repos["me/seq"]
    files = dict(repo.resolve("main").files)
    files["eblora_sequence.json"] = json.dumps(
        json.loads(files["eblora_sequence.json"]) | {"bases": "included"}
    ).encode()
    repo.commit("main", "a collaborator", files)
    with pytest.raises(ValueError, match="somebody has changed it"):
        push_sequence(copy, "me/seq")


@pytest.mark.parametrize("metadata", ["license: [mit", "license: <b>mit</b>", "- a list", "license: {a: 1}"])
def test_a_card_that_cannot_be_read_is_left_alone_and_named(server, sequence, caplog, metadata):
    card = f"---\n{metadata}\n---\n# Mine\n"
    part = PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:1])
    push_sequence(part, "me/seq", card=render_card)
    repo = server.repos["me/seq"]
    repo.commit("main", "by hand", repo.resolve("main").files | {"README.md": card.encode()})
    push_sequence(sequence, "me/seq", card=render_card)
    assert repo.resolve("main").files["README.md"] == card.encode()
    assert "README.md in me/seq cannot be read and is left as it is" in caplog.text
    assert fetch_sequence("me/seq").names == ["one", "two"]


def test_only_what_lies_beside_the_adapter_is_pushed_with_it(server, sequence, tmp_path):
    """Also where a stranger has made the folder that was cloned."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (sequence.folder / "vocab.txt").symlink_to(secret)
    (sequence.folder / "tokenizer.json").write_text("{}")
    remember(sequence.folder, companions=["tokenizer.json", "vocab.txt", "gone.txt"])
    push_sequence(sequence, "me/seq")
    files = server.repos["me/seq"].resolve("main").files
    assert "tokenizer.json" in files
    assert not {"vocab.txt", "gone.txt"} & set(files)
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        with pytest.raises(ValueError, match=r"companions\.0: "):
            remember(sequence.folder, companions=[name])
        (sequence.folder / SETTINGS).write_text(json.dumps({"companions": [name]}))
        with pytest.raises(ValueError, match=r"eblora_local.json is not a readable record.*companions\.0"):
            push_sequence(sequence, "me/seq")
        (sequence.folder / SETTINGS).unlink()


# ---- sizes ----


def test_a_huge_index_is_not_even_fetched(server, sequence):
    push_sequence(sequence, "me/seq")
    repo = server.repos["me/seq"]
    repo.commit("main", "huge", repo.resolve("main").files | {"eblora_sequence.json": b" " * (MAX_INDEX + 1)})
    with pytest.raises(ValueError, match=r"eblora_sequence.json in me/seq has \d+ bytes, expected at most"):
        load_sequence(make_model("bert"), "me/seq")


def test_many_files_and_tasks_do_not_take_long(server, tmp_path):
    """Sixty tasks among twenty thousand other files: each of theirs is fetched once, and of the others none."""
    made = new_sequence(tmp_path / "out")
    for number in range(60):
        append(made, f"t{number}", 0, extensions=None)
    push_sequence(PublishedSequence(made.folder, made.base_model, made.tasks[:1]), "me/seq")
    repo = server.repos["me/seq"]
    files = {name: (made.folder / name).read_bytes() for task in made.tasks for name in task.files}
    files |= made.state_after(60) | {f"other/{number}.txt": b"" for number in range(20_000)}
    repo.commit("main", "many", files)
    server.requests.clear()
    assert len(fetch_sequence("me/seq").tasks) == 60
    assert len(server.requests) < 3 * 60 * 3 + 50
