"""The Hub: the real client against a local server, over real HTTP."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import tenacity
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel

from eblora_hf import ContinualEBLoRATrainer, PublishedSequence, load_sequence
from eblora_hf.adapters.composition import concatenate
from eblora_hf.published import files, hub, requests
from eblora_hf.published.card import loading_code, render_card
from eblora_hf.published.loading import fetch_sequence
from eblora_hf.published.owner import SETTINGS

from ..support.children import run_in_child, run_script
from ..support.hub_server import TOKEN
from ..support.sequences import append, new_sequence
from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data

TASKS = ("one", "two", "three")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Three tasks with a head and an accuracy matrix, learnt once for this module."""
    folder = tmp_path_factory.mktemp("learnt") / "out"
    evaluation = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(TASKS)}
    trainer = ContinualEBLoRATrainer(
        model=make_model("bert"),
        args=make_arguments(folder),
        peft_config=lora(task_type="SEQ_CLS"),
        train_dataset={name: make_text_data("bert", seed=i) for i, name in enumerate(TASKS)},
        eval_dataset=evaluation,
        compute_metrics=accuracy,
    )
    trainer.train()
    return PublishedSequence.open(folder)


@pytest.fixture(autouse=True)
def _new_owner(learnt):
    """Every test pushes the same sequence as if for the first time."""
    (learnt.folder / SETTINGS).unlink(missing_ok=True)


def logits(model):
    with torch.no_grad():
        return model.eval()(**make_text_data("bert", seed=9)[:4]).logits


def test_three_tasks_are_pushed_tagged_and_loaded_by_plain_peft(server, learnt):
    assert hub.push_sequence(learnt, "me/seq", card=render_card) == "me/seq"
    repo = server.repos["me/seq"]
    titles = [commit.title for commit in repo.history("main")]
    assert titles == ["Add task-02-three", "Add task-01-two", "Add task-00-one", "initial commit"]
    assert set(repo.tags) == {"task-00-one", "task-01-two", "task-02-three"}
    files = set(repo.resolve("main").files)
    assert "tasks/02-three/subspace.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt")) or "checkpoint" in name]
    # plain PEFT: all, one task alone, the state after a task
    whole = logits(PeftModel.from_pretrained(make_model("bert"), "me/seq"))
    torch.testing.assert_close(whole, logits(PeftModel.from_pretrained(make_model("bert"), learnt.folder)))
    one = logits(PeftModel.from_pretrained(make_model("bert"), "me/seq", subfolder="tasks/01-two"))
    torch.testing.assert_close(
        one, logits(PeftModel.from_pretrained(make_model("bert"), learnt.folder / "tasks/01-two"))
    )
    after = logits(PeftModel.from_pretrained(make_model("bert"), "me/seq", revision="task-01-two"))
    torch.testing.assert_close(after, logits(load_sequence(make_model("bert"), learnt.folder, upto="two")))
    torch.testing.assert_close(after, logits(load_sequence(make_model("bert"), "me/seq", revision="task-01-two")))
    torch.testing.assert_close(whole, logits(load_sequence(make_model("bert"), "me/seq")))
    # pushing again changes nothing
    hub.push_sequence(learnt, "me/seq", card=render_card)
    assert len(repo.history("main")) == 4


def test_parts_of_a_sequence_and_other_heads(learnt):
    base, states = make_model("bert"), learnt.adapters()
    without = load_sequence(base, learnt.folder, exclude=["two"])
    delta = sum(
        state["base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"]
        @ state["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
        for state in (states[0], states[2])
    )
    layer = without.get_base_model().bert.encoder.layer[0].attention.self.query
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    head = load_sequence(make_model("bert"), learnt.folder, head="one").get_base_model().classifier.modules_to_save
    assert torch.equal(head["default"].weight, states[0]["base_model.model.classifier.weight"])
    with pytest.raises(ValueError, match="expected names out of one, two, three"):
        load_sequence(make_model("bert"), learnt.folder, head="four")
    with pytest.raises(ValueError, match="other names or shapes"):
        load_sequence(make_model("llama"), learnt.folder)
    # the order of a sum does not matter
    forward, backward = (concatenate(learnt.adapters(names)) for names in (["one", "two"], ["two", "one"]))
    for key in [key for key in forward if key.endswith("lora_B.weight")]:
        a = key.replace("lora_B", "lora_A")
        torch.testing.assert_close(forward[key] @ forward[a], backward[key] @ backward[a], atol=1e-6, rtol=1e-5)


def test_server_errors_are_retried(server, learnt):
    server.fail(503, 2, r"POST /api/models/.*/commit/")
    server.fail(429, 1, r"POST /api/models/.*/tag/")
    hub.push_sequence(learnt, "me/seq")
    assert len(server.repos["me/seq"].tags) == 3


def test_a_broken_upload_is_repeated_and_an_endless_one_raises(server, learnt):
    server.fail(500, 1, r"PUT /lfs/")
    hub.push_sequence(learnt, "me/seq")
    assert len(server.repos["me/seq"].history("main")) == 4
    server.fail(503, 1000, r"POST /api/models/me/other/commit/")
    with pytest.raises(HfHubHTTPError, match="503"):
        hub.push_sequence(learnt, "me/other")
    assert len(server.repos["me/other"].history("main")) == 1  # nothing half-written
    server.faults.clear()
    hub.push_sequence(learnt, "me/other")
    assert len(server.repos["me/other"].history("main")) == 4


def test_a_push_interrupted_before_its_tag_is_completed_by_the_next(server, learnt):
    server.fail(403, 1, r"POST /api/models/me/seq/tag/")
    with pytest.raises(HfHubHTTPError):
        hub.push_sequence(learnt, "me/seq")
    assert len(server.repos["me/seq"].history("main")) == 4
    hub.push_sequence(learnt, "me/seq")
    tagged = {name: server.repos["me/seq"].resolve(name).title for name in server.repos["me/seq"].tags}
    assert tagged == {f"task-{i:02d}-{name}": f"Add task-{i:02d}-{name}" for i, name in enumerate(TASKS)}


def test_somebody_elses_tasks_are_never_overwritten(server, learnt, tmp_path):
    theirs = new_sequence(tmp_path / "theirs")
    append(theirs, "alien", 0)
    hub.push_sequence(theirs, "me/seq")
    before = server.repos["me/seq"].branches["main"]
    with pytest.raises(
        hub.SequenceConflictError, match=r"'alien' at position 0.*Nothing was pushed.*sequence='me/seq'"
    ):
        hub.push_sequence(learnt, "me/seq")
    assert server.repos["me/seq"].branches["main"] == before


def test_a_commit_in_between_is_noticed(server, learnt):
    def somebody_else():
        server.before_commit = lambda: None
        server.repos["me/seq"].commit("main", "theirs", {"theirs.txt": b"1"})

    server.before_commit = somebody_else
    with pytest.raises(hub.SequenceConflictError, match="changed while 'Add task-00-one' was being pushed"):
        hub.push_sequence(learnt, "me/seq")
    assert server.repos["me/seq"].resolve("main").files == {"theirs.txt": b"1"}


def test_a_refused_token(server, learnt, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        hub.push_sequence(learnt, "me/seq")
    hub.push_sequence(learnt, "me/seq", token=TOKEN, private=True)
    assert server.repos["me/seq"].private


@pytest.mark.parametrize("push_bases", [False, "me/bases"])
def test_bases_can_stay_local_or_go_elsewhere(server, learnt, tmp_path, push_bases):
    hub.push_sequence(learnt, "me/seq", push_bases=push_bases, card=render_card)
    files = server.repos["me/seq"].resolve("main").files
    assert not [name for name in files if "subspace" in name]
    card = files["README.md"].decode()
    torch.testing.assert_close(
        logits(load_sequence(make_model("bert"), "me/seq")), logits(load_sequence(make_model("bert"), learnt.folder))
    )
    if push_bases is False:
        assert "were not published" in card
        with pytest.raises(FileNotFoundError, match="bases of this sequence were not published with it"):
            fetch_sequence("me/seq", folder=tmp_path / "copy").bases()
    else:
        assert server.repos["me/bases"].private
        assert "`me/bases`" in card
        fetched = fetch_sequence("me/seq", folder=tmp_path / "copy")
        expected = learnt.bases()
        assert all(torch.equal(basis, expected[name]) for name, basis in fetched.bases().items())


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "tasks/01-two/adapter_config.json", "tasks/00-one/subspace.safetensors"]
)
def test_a_flipped_byte_on_the_hub_is_named(server, learnt, name):
    hub.push_sequence(learnt, "me/seq")
    files = server.repos["me/seq"].resolve("main").files
    data = bytearray(files[name])
    data[-5] ^= 1
    files[name] = bytes(data)
    with pytest.raises(ValueError, match=rf"{name} .*was changed"):
        load_sequence(make_model("bert"), "me/seq")


def test_sources_that_hold_no_sequence(server, tmp_path):
    HfApi().create_repo("me/empty")
    with pytest.raises(FileNotFoundError, match="me/empty holds no sequence"):
        load_sequence(make_model("bert"), "me/empty")
    with pytest.raises(FileNotFoundError, match="holds no sequence"):
        load_sequence(make_model("bert"), tmp_path)
    with pytest.raises(FileNotFoundError, match="me/nothing is neither a folder nor a repository on the Hub"):
        load_sequence(make_model("bert"), "me/nothing")


# ---- what must not happen ----


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_look_is_never_taken_for_an_empty_repository(server, learnt, tmp_path, monkeypatch, status):
    theirs = new_sequence(tmp_path / "theirs")
    append(theirs, "alien", 0)
    hub.push_sequence(theirs, "me/seq")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.fail(status, 1000, r"HEAD /me/seq/resolve/.*/eblora_sequence.json")
    with pytest.raises(Exception, match=r"(?i)error|cannot find|Nothing was pushed"):
        hub.push_sequence(learnt, "me/seq")
    server.faults.clear()
    assert server.repos["me/seq"].resolve("main").title == "Add task-00-alien"


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), ("me/bases", True), (True, "me/bases")])
def test_where_the_bases_are_cannot_change(server, learnt, first, second):
    part = PublishedSequence(learnt.folder, learnt.base_model, learnt.tasks[:1])
    hub.push_sequence(part, "me/seq", push_bases=first)
    with pytest.raises(ValueError, match="where they are cannot change later"):
        hub.push_sequence(learnt, "me/seq", push_bases=second)
    hub.push_sequence(learnt, "me/seq")  # as it is there
    public = [name for name in server.repos["me/seq"].resolve("main").files if "subspace" in name]
    assert len(public) == (3 if first is True else 0)
    load_sequence(make_model("bert"), "me/seq")
    if first == "me/bases":
        assert len(server.repos["me/bases"].resolve("main").files) == 4


def test_bases_never_go_to_a_public_repository_or_over_others(server, learnt, tmp_path):
    HfApi().create_repo("me/public")
    with pytest.raises(ValueError, match="me/public for the bases is public"):
        hub.push_sequence(learnt, "me/seq", push_bases="me/public")
    theirs = new_sequence(tmp_path / "theirs")
    append(theirs, "one", 0)
    hub.push_sequence(theirs, "me/theirs", push_bases="me/bases")
    with pytest.raises(hub.SequenceConflictError, match="holds the bases of another sequence"):
        hub.push_sequence(learnt, "me/seq", push_bases="me/bases")
    assert "eblora_sequence.json" not in server.repos["me/seq"].resolve("main").files


@pytest.mark.parametrize("content", [b'{"format_version": 2}', b"{}", b"[]", b"{"])
def test_an_index_that_we_do_not_understand_is_not_overwritten(server, learnt, content):
    hub.push_sequence(learnt, "me/seq")
    repo = server.repos["me/seq"]
    repo.commit("main", "broken", repo.resolve("main").files | {"eblora_sequence.json": content})
    head = server.repos["me/seq"].branches["main"]
    with pytest.raises(ValueError, match="not a readable index"):
        hub.push_sequence(learnt, "me/seq")
    assert server.repos["me/seq"].branches["main"] == head


def test_a_lost_answer_to_our_own_commit_is_no_conflict(server, learnt):
    HfApi().create_repo("me/seq")
    server.lost_answers = 1
    hub.push_sequence(learnt, "me/seq")
    assert len(server.repos["me/seq"].history("main")) == 4
    assert len(server.repos["me/seq"].tags) == 3


def test_the_newest_commit_of_a_title_is_tagged(server, learnt):
    hub.push_sequence(learnt, "me/seq")
    repo = server.repos["me/seq"]
    repo.tags.clear()
    repo.commit("main", "emptied", {".gitattributes": b""})
    hub.push_sequence(learnt, "me/seq")
    assert repo.tags["task-02-three"] == repo.branches["main"]


def test_a_licence_on_the_hub_is_kept(server, learnt):
    part = PublishedSequence(learnt.folder, learnt.base_model, learnt.tasks[:1])
    hub.push_sequence(part, "me/seq", card=render_card, licence="mit")
    hub.push_sequence(learnt, "me/seq", card=render_card)
    card = server.repos["me/seq"].resolve("main").files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "| three |" in card


def test_strays_on_the_hub_and_revisions(server, learnt, tmp_path):
    hub.push_sequence(learnt, "me/seq")
    server.repos["me/seq"].resolve("main").files["tasks/README.md"] = b"by hand"
    assert fetch_sequence("me/seq", folder=tmp_path / "all").names == list(TASKS)
    assert not (tmp_path / "all" / "tasks" / "README.md").exists()
    assert fetch_sequence("me/seq@task-01-two", folder=tmp_path / "two").names == ["one", "two"]
    with pytest.raises(ValueError, match="revision='task-00-one' is for the Hub"):
        load_sequence(make_model("bert"), learnt.folder, revision="task-00-one")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_while_pulling(server, learnt, tmp_path):
    """At whatever file of the copy: the folder counts as empty, and the same command again completes it."""
    hub.push_sequence(learnt, "me/seq", push_bases="me/bases")

    def pull_and_die(after):
        count, real = 0, os.replace

        def counted(*args):
            nonlocal count
            real(*args)
            count += 1
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)

        files.os.replace = counted
        fetch_sequence("me/seq", folder=tmp_path / "copy")

    for after in (1, 5, 9, 13):
        assert os.WIFSIGNALED(run_in_child(lambda after=after: pull_and_die(after)))
        assert not PublishedSequence.exists(tmp_path / "copy")
    fetched = fetch_sequence("me/seq", folder=tmp_path / "copy")
    expected = learnt.bases()
    assert all(torch.equal(basis, expected[name]) for name, basis in fetched.bases().items())


def test_a_task_without_a_head_has_none_to_give(tmp_path):
    sequence = new_sequence(tmp_path)
    append(sequence, "one", 0)
    with pytest.raises(ValueError, match="'one' has no head of its own"):
        load_sequence(make_model("bert"), tmp_path, head="one")


# ---- the card ----


def test_card(learnt, server, tmp_path):
    text = render_card(learnt, "me/seq", licence="apache-2.0")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-classification"
    assert {"continual-learning", "lora"} <= set(metadata["tags"])
    results = metadata["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == list(TASKS)
    assert results[0]["metrics"][0]["value"] == learnt.tasks[-1].metrics["one"]
    for task in learnt.tasks:
        assert f"| {task.name} |" in text
    assert "| MFN |" in text
    assert "mean over i of R[T][i]" in text
    assert "can reveal" in text
    assert str(learnt.folder) not in text
    assert "base_model" not in metadata  # made from config: there is nothing to name
    assert "Please fill in `base_model`" in text
    assert "Please fill in `license`" in render_card(learnt, "me/seq")
    lines = text.split("---\n", 2)[2].splitlines()
    for before, line in itertools.pairwise(lines):  # Markdown needs a blank line around tables and before headings
        assert not (line.startswith("#") and before), line
        assert line.startswith("|") == before.startswith("|") or not before or not line, (before, line)
    assert "\n\n\n\n" not in text


def test_the_cards_loading_code_runs(learnt, tmp_path, server):
    """With the base model saved under the name in the card, in a process that cannot import this package."""
    make_model("bert").save_pretrained(tmp_path / "org" / "base")
    hub.push_sequence(learnt, "me/seq")
    named = PublishedSequence(learnt.folder, learnt.base_model | {"name_or_path": "org/base"}, learnt.tasks)
    code = loading_code(named, "me/seq")
    assert "'org/base', num_labels=3)" in code
    assert code in render_card(named, "me/seq")
    torch.save(make_text_data("bert", seed=9)[:4], tmp_path / "inputs.pt")
    script = f"""
import sys
sys.modules["eblora_hf"] = None
{code}
import torch
inputs = torch.load("inputs.pt")
torch.save(model.eval()(**inputs).logits.detach(), "logits.pt")
"""
    result = run_script(script, tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr[-2000:]
    expected = logits(load_sequence(make_model("bert"), learnt.folder))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)


# ---- the trainer ----


def trainer_for(folder, tasks=TASKS[:2], **overrides):
    hub_options = {key: overrides.pop(key) for key in list(overrides) if key.startswith(("hub_", "push_"))}
    arguments = {
        "model": make_model("bert"),
        "args": make_arguments(folder, **hub_options),
        "peft_config": lora(task_type="SEQ_CLS"),
        "train_dataset": {name: make_text_data("bert", seed=TASKS.index(name)) for name in tasks},
    }
    return ContinualEBLoRATrainer(**(arguments | overrides))


HUB = {"push_to_hub": True, "hub_model_id": "me/run", "hub_private_repo": True}


def test_training_pushes_after_each_task(server, tmp_path):
    trainer = trainer_for(tmp_path / "out", **HUB)
    trainer.train()
    repo = server.repos["me/run"]
    assert repo.private
    assert [commit.title for commit in repo.history("main")][:2] == ["Add task-01-two", "Add task-00-one"]
    assert "README.md" in repo.resolve("main").files
    trainer.push_to_hub(dataset="digits")  # as scripts call it
    trainer.save_model()
    assert len(repo.history("main")) == 3
    assert not [path for path in repo.resolve("main").files if path.endswith(".bin")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_learning_goes_on_from_the_hub_on_another_machine(server, tmp_path):
    """
    Task one in one process and folder, push; another process and folder pulls and learns task two: as in one run.
    """
    assert run_in_child(lambda: trainer_for(tmp_path / "a", tasks=("one",), **HUB).train()) == 0
    assert run_in_child(lambda: trainer_for(tmp_path / "b", tasks=("two",), sequence="me/run", **HUB).train()) == 0
    trainer_for(tmp_path / "whole").train()
    split, whole = PublishedSequence.open(tmp_path / "b"), PublishedSequence.open(tmp_path / "whole")
    names = ("adapter_model", "tasks/00-one/subspace", "tasks/01-two/subspace", "tasks/01-two/adapter_model")
    for name in names:
        file = f"{name}.safetensors"
        assert (split.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
    assert set(server.repos["me/run"].tags) == {"task-00-one", "task-01-two"}


def test_hub_revision_and_strategy(server, tmp_path):
    trainer_for(tmp_path / "out", **HUB, hub_revision="draft", hub_strategy="end", hub_token=TOKEN).train()
    repo = server.repos["me/run"]
    assert [commit.title for commit in repo.history("draft")][:2] == ["Add task-01-two", "Add task-00-one"]
    assert [commit.title for commit in repo.history("main")] == ["initial commit"]
    commits = [path for method, path in server.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 2
    trained = [i for i, (_, path) in enumerate(server.requests) if "/commit/" in path]
    assert trained[1] - trained[0] < 12  # both at the end, not one per task with training in between


def test_an_unreachable_hub_is_tried_again_and_then_an_error(learnt, monkeypatch):
    monkeypatch.setattr(requests._retry, "wait", tenacity.wait_none())
    attempts = []
    monkeypatch.setattr(requests._retry, "before_sleep", lambda state: attempts.append(state.attempt_number))
    with pytest.raises(Exception, match=r"(?i)connect"):
        hub.push_sequence(learnt, "me/seq", token=TOKEN)
    assert attempts == [1, 2, 3, 4, 5]


def test_no_local_path_is_published(server, tmp_path):
    make_model("bert").save_pretrained(tmp_path / "secret" / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "secret" / "base")
    trainer_for(tmp_path / "out", tasks=("one",), model=model, **HUB).train()
    for name, data in server.repos["me/run"].resolve("main").files.items():
        assert str(tmp_path).encode() not in data, name
        assert b"secret" not in data, name


def test_a_failed_push_loses_nothing_and_is_made_up_for(server, tmp_path):
    server.fail(503, 1000, r"POST /api/models/me/run/commit/")
    trainer = trainer_for(tmp_path / "out", **HUB)
    with pytest.raises(RuntimeError, match=r"(?s)could not be pushed to me/run.*trainer.push_to_hub\(\)"):
        trainer.train()
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]
    server.faults.clear()
    trainer.push_to_hub()
    assert set(server.repos["me/run"].tags) == {"task-00-one", "task-01-two"}


def test_a_hub_that_goes_away_does_not_stop_the_training(server, tmp_path, caplog):
    trainer = trainer_for(tmp_path / "out", **HUB)

    def go_away():
        server.shutdown()
        server.server_close()

    trainer.publisher.prepare = lambda sequence: go_away()
    trainer.train()
    assert "could not be pushed to me/run" in caplog.text
    assert "call `trainer.push_to_hub()`" in caplog.text
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]


def test_resuming_does_not_forget_the_source(server, tmp_path, learnt):
    hub.push_sequence(learnt, "me/other")
    trainer_for(tmp_path / "out", tasks=("one",)).train()
    with pytest.raises(hub.SequenceConflictError, match="me/other has the task"):
        trainer_for(tmp_path / "out", sequence="me/other").train(resume_from_checkpoint=True)


def test_a_conflict_or_bad_token_stops_before_training(server, tmp_path, learnt):
    hub.push_sequence(learnt, "me/run")
    with pytest.raises(hub.SequenceConflictError, match="Nothing was pushed"):
        trainer_for(tmp_path / "out", **HUB).train()
    with pytest.raises(HfHubHTTPError, match="401"):
        trainer_for(tmp_path / "other", push_to_hub=True, hub_model_id="me/other", hub_token="hf_wrong").train()
    assert not (tmp_path / "out" / "tasks").exists()


def test_index_says_what_an_adapter_is(learnt):
    index = json.loads(Path(learnt.folder / "eblora_sequence.json").read_text())
    assert index["tasks"][0]["folder"] == "tasks/00-one"
    assert set(index["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
