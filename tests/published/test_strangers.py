"""What a stranger has published is data: it is read as what it should be, or refused by name, and changes nothing."""

import contextlib
import copy
import json
import os
import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from eblora_hf import ContinualEBLoRATrainer, PublishedSequence, load_sequence
from eblora_hf.published.adapter_files import check_adapter_file, check_factors
from eblora_hf.published.card import render_card
from eblora_hf.published.index import INDEX
from eblora_hf.published.loading import fetch_sequence
from eblora_hf.published.plain_lora import read_adapter
from eblora_hf.published.schema import MAX_TASKS
from eblora_hf.published.strays import check_links

from ..support.children import run_in_child
from ..support.sequences import edit_json, edit_tensors, rehash
from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data
from ..support.trainers import make_trainer

HANGS = r"(([a-z]|\.|[0-9])*)*!"  # hours on a name of thirty letters
QUERY = "bert.encoder.layer.0.attention.self.query"
LORA_A = f"base_model.model.{QUERY}.lora_A.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two tasks with a head, as somebody has published them."""
    folder = tmp_path_factory.mktemp("published") / "out"
    ContinualEBLoRATrainer(
        model=make_model("bert"),
        args=make_arguments(folder),
        peft_config=lora(task_type="SEQ_CLS"),
        train_dataset={name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two"))},
        eval_dataset={name: make_text_data("bert", seed=i + 50) for i, name in enumerate(("one", "two"))},
        compute_metrics=accuracy,
    ).train()
    shutil.rmtree(folder / "checkpoints")
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "out")


def logits(model):
    with torch.no_grad():
        return model.eval()(**make_text_data("bert", seed=9)[:4]).logits


def continues(folder):
    return make_trainer(folder, tasks=("three",), sequence=folder, peft_config=lora(task_type="SEQ_CLS")).train()


def refuses(call, folder, words):
    """A `ValueError` that names a file, with the base model as it was, nothing appended, and in no time."""

    def refused():
        base = make_model("bert")
        before = {name: value.clone() for name, value in base.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            call(base)
        after = base.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not list(folder.glob("tasks/02-*"))

    assert run_in_child(refused, kill_after=60) == 0


# ---- adapter_config.json ----


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": HANGS},
        {"target_modules": [HANGS, "query"]},
        {"target_modules": ["query"]},
        {"target_modules": None},
        {"exclude_modules": HANGS},
        {"exclude_modules": ["query"]},
        {"rank_pattern": {HANGS: 3}},
        {"alpha_pattern": {HANGS: 3.0}},
        {"rank_pattern": {"query": 1}},
        {"r": 1, "lora_alpha": 1000},
        {"use_rslora": True},
        {"layers_to_transform": [0]},
        {"layers_pattern": HANGS},
        {"base_model_name_or_path": "/etc/passwd"},
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.9},
        {"inference_mode": False},
        {"task_type": "CAUSAL_LM"},
        {"task_type": "QUESTION_ANS"},
        {"megatron_config": {"a": 1}},
        {"auto_mapping": {"base_model_class": "os.system"}},
    ],
)
def test_a_configuration_decides_nothing_of_how_an_adapter_is_built(published, folder, change):
    for path in folder.rglob("adapter_config.json"):
        edit_json(path, **change)
    rehash(folder)

    def loads():
        base = make_model("bert")
        before = {name: value.clone() for name, value in base.state_dict().items()}
        expected = logits(load_sequence(make_model("bert"), published))
        torch.testing.assert_close(logits(load_sequence(base, folder)), expected, atol=0.0, rtol=0.0)
        after = load_sequence(base, folder).unload().state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if "classifier" not in name)
        continues(folder)  # writes a root that stock PEFT loads
        config = json.loads((folder / "adapter_config.json").read_text())
        assert HANGS not in json.dumps(config)
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)

    assert run_in_child(loads, kill_after=100) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3 adapter, expected LORA"),
        ({"peft_type": None}, "expected LORA"),
        ({"use_dora": True}, "not plain LoRA .use_dora"),
        ({"alora_invocation_tokens": [1]}, "not plain LoRA .alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "not plain LoRA .layer_replication"),
        ({"trainable_token_indices": [1]}, "not plain LoRA .trainable_token_indices"),
        ({"bias": "all"}, "bias: .*'all'"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"r": "4"}, "r: .*valid integer, got '4'"),
        ({"r": 0}, "r: .*got 0"),
        ({"lora_alpha": "8"}, "lora_alpha: .*valid number"),
        ({"task_type": "rm -rf"}, "task_type: .*got 'rm -rf'"),
        ({"modules_to_save": "classifier"}, "modules_to_save: .*valid array"),
        ({"modules_to_save": ["(a*)*!"]}, "modules_to_save.0: "),
        ({"rank_pattern": [1]}, "rank_pattern: "),
        ({"modules_to_save": None}, "neither a LoRA factor nor part of a declared head"),
        ({"modules_to_save": ["word_embeddings"]}, "neither a LoRA factor nor part of a declared head"),
    ],
)
def test_a_configuration_of_something_else_is_refused_by_name(folder, change, words):
    edit_json(folder / "tasks/01-two/adapter_config.json", **change)
    rehash(folder)
    refuses(lambda base: load_sequence(base, folder), folder, f"01-two.*{words}")
    refuses(lambda base: continues(folder), folder, f"01-two.*{words}")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"{" * 50_000, b'{"a":' * 50_000, b"1" * 5_000_000])
@pytest.mark.parametrize("name", [INDEX, "tasks/00-one/adapter_config.json", "tasks/00-one/training.json"])
def test_json_that_is_none_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    if name != INDEX:
        rehash(folder)

    def read():
        sequence = PublishedSequence.open(folder)
        return sequence.training(), sequence.check_adapters(make_model("bert"))

    with pytest.raises(ValueError, match=f"{name} is not a readable"):
        read()


# ---- tensors ----


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("base_model.model.bert.embeddings.word_embeddings.weight", torch.ones(60, 32)), "neither a LoRA factor"),
        (put(f"base_model.model.{QUERY}.base_layer.weight", torch.ones(32, 32)), "neither a LoRA factor"),
        (put("word_embeddings.weight", torch.ones(60, 32)), "has 'word_embeddings.weight'"),
        (put(f"base_model.model.{QUERY}.lora_magnitude_vector.weight", torch.ones(32)), "lora_magnitude_vector"),
        (put("base_model.model.classifier.extra", torch.ones(3)), "classifier.extra .*has none of that name"),
        (put("base_model.model.classifier.weight", torch.ones(5, 32)), r"classifier.weight of shape \(5, 32\)"),
        (
            lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("classifier.bias")},
            "lacks classifier.bias of .*'classifier'",
        ),
        (put(LORA_A, torch.ones(4, 33)), "adapts .*query.* 33. outputs and inputs, but the model has one of .32, 32."),
        (put(LORA_A, torch.ones(3, 32)), "has factors B .* and A .3, 32."),
        (put(LORA_A, torch.ones(32)), "has factors B .* and A .32,"),
        (put(LORA_A, torch.ones(0, 32)), "has factors B .* and A .0, 32."),
        (put(LORA_A, torch.full((4, 32), torch.nan)), "is not finite"),
        (put(LORA_A, torch.ones(4, 32, dtype=torch.int64)), "is of torch.int64"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != LORA_A}, f"has '{QUERY}'"),
        (lambda tensors: {"nothing": torch.zeros(1)}, "has 'nothing'"),
        (
            lambda tensors: {k.replace("layer.0", "layer.7"): v for k, v in tensors.items()},
            "differ in|no linear layer of that name",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, change, words):
    edit_tensors(folder / "tasks/01-two/adapter_model.safetensors", change)
    rehash(folder)
    refuses(lambda base: load_sequence(base, folder), folder, words)
    refuses(lambda base: continues(folder), folder, words)


@pytest.mark.parametrize("head", ["query", "self", "encoder", "bert", "layer"])
def test_a_head_is_no_part_of_what_is_adapted(folder, head):
    for path in folder.rglob("adapter_config.json"):
        edit_json(path, modules_to_save=["classifier", head])
    edit_tensors(
        folder / "tasks/01-two/adapter_model.safetensors",
        put("base_model.model.bert.encoder.layer.0.attention.self.query.weight", torch.ones(32, 32)),
    )
    rehash(folder)
    refuses(lambda base: load_sequence(base, folder), folder, f"head '{head}' holds layers that the adapter adapts")


def test_tasks_of_other_widths_are_named_by_whatever_adds_them(folder, tmp_path):
    edit_tensors(folder / "tasks/01-two/adapter_model.safetensors", put(LORA_A, torch.ones(4, 16)))
    rehash(folder)
    with pytest.raises(ValueError, match=f"lora_A of {QUERY} has 16 and 32 columns in different tasks"):
        fetch_sequence(folder, folder=tmp_path / "copy")


def test_a_sequence_without_a_task_is_none(folder, tmp_path):
    edit_json(folder / INDEX, tasks=[])
    with pytest.raises(ValueError, match=r"tasks: .*at least 1 item"):
        fetch_sequence(folder, folder=tmp_path / "copy")


@pytest.mark.parametrize(
    ("head", "name"), [("word_embeddings", "bert.embeddings.word_embeddings"), ("ifier", "classifier")]
)
def test_a_head_that_a_run_does_not_train_does_not_replace_the_users(tmp_path, head, name):
    """Whether a stranger or the user has trained it."""
    options = {"tasks": ("one",), "peft_config": lora(target_modules=["query"], modules_to_save=[head])}
    make_trainer(tmp_path / "out", **options).train()
    model = make_model("bert")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"have trained {head} as well.*modules_to_save=\['{head}'\]"):
        make_trainer(
            tmp_path / "out",
            model=model,
            tasks=("two",),
            sequence=tmp_path / "out",
            peft_config=lora(target_modules=["query"]),
        ).train()
    after = {key.replace(".base_layer", ""): x for key, x in model.state_dict().items() if ".lora_" not in key}
    assert all(torch.equal(after[key], x) for key, x in before.items())
    loaded = load_sequence(make_model("bert"), tmp_path / "out").get_base_model().get_submodule(name)
    assert not torch.equal(loaded.modules_to_save["default"].weight, before[f"{name}.weight"])


# ---- what is not to be refused ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"modules_to_save": ["lm_head"]}),  # tied
        ("t5", {"modules_to_save": ["lm_head"]}),  # tied
        ("bert", {"task_type": "FEATURE_EXTRACTION", "exclude_modules": ["classifier"]}),
        ("bert", {"task_type": "SEQ_CLS", "rank_pattern": {"query": 2}}),
        ("bert", {"task_type": "SEQ_CLS", "target_modules": r".*\.(query|key)"}),
        ("bert", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"], "target_modules": ["query"]}),
    ],
)
def test_what_peft_can_do_is_published_loaded_and_continued(tmp_path, kind, options):
    options = {
        "kind": kind,
        "peft_config": lora(**({"target_modules": ["q", "v"]} if kind == "t5" else {}), **options),
    }
    make_trainer(tmp_path / "out", tasks=("one",), **options).train()
    options["peft_config"] = copy.deepcopy(options["peft_config"])
    make_trainer(tmp_path / "out", tasks=("two",), sequence=tmp_path / "out", **options).train()
    stock = PeftModel.from_pretrained(make_model(kind), tmp_path / "out").eval()
    ours = load_sequence(make_model(kind), tmp_path / "out")
    batch = make_text_data(kind, seed=9)[:4]
    with torch.no_grad():
        outputs = [model.get_base_model()(**batch).logits for model in (stock, ours)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", ["heads.head-a", "a.b-c.d_e"])
def test_names_with_a_dash_are_names(name):
    state = {f"base_model.model.{name}.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"}
    check_factors(state, "an adapter")
    data = json.dumps({"peft_type": "LORA", "modules_to_save": [name]}).encode()
    assert check_adapter_file(data).modules_to_save == [name]


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        ("(" * 5000 + "a" + ")" * 5000, True),
        ("(?:(?R))*", True),
        ("(", True),
        (HANGS, False),
        (r"(\w+\.?)+\.no", False),
    ],
)
def test_patterns_of_any_lora_are_matched_within_limits(folder, pattern, refused):
    edit_json(folder / "adapter_config.json", alpha_pattern={pattern: 3.0})

    def reads():
        message = r"is no regular expression, or takes too long to match"
        with pytest.raises(ValueError, match=message) if refused else contextlib.suppress(ValueError):
            read_adapter(folder)

    assert run_in_child(reads, kill_after=60) == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "a pointer of Git LFS.*git lfs pull"),
        (b"", "damaged"),
        (b"\xff" * 64, "damaged"),
        (pickle.dumps({"a": 1}), "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "subspace.safetensors"])
def test_files_that_hold_no_tensors_are_named(folder, name, data, words):
    path = folder / "tasks/00-one" / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"00-one/{name} (of the task 'one' was changed|is a pointer)"):
        PublishedSequence.open(folder)
    rehash(folder)
    with pytest.raises(ValueError, match=f"00-one/{name} .*{words}"):
        continues(folder)


# ---- bases ----


def damaged(change):
    return lambda tensors: tensors.update({f"{QUERY}.columns": change(tensors[f"{QUERY}.columns"])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {"nothing": torch.zeros(1)}, "columns for each layer"),
        (lambda tensors: tensors.pop(f"{QUERY}.columns") * 0, "columns for each layer"),
        (damaged(lambda columns: 2.0 * columns), "not orthonormal"),
        (damaged(lambda columns: torch.cat([columns, columns[:, :1]], dim=1)), "not orthonormal"),
        (damaged(lambda columns: columns[:-1]), r"have shape \(31, "),
        (damaged(lambda columns: columns[:, 0]), r"have shape \(32,\)"),
        (damaged(lambda columns: columns * torch.nan), "not finite"),
        (damaged(lambda columns: columns.to(torch.int8)), "torch.int8"),
    ],
)
@pytest.mark.parametrize("task", ["00-one", "01-two"])
def test_bases_that_protect_nothing_are_refused_by_name(folder, task, change, words):
    def changed(tensors):
        changed_tensors = change(tensors)
        return changed_tensors if isinstance(changed_tensors, dict) else None

    edit_tensors(folder / "tasks" / task / "subspace.safetensors", changed)
    rehash(folder)
    load_sequence(make_model("bert"), folder)  # which needs none
    with pytest.raises(ValueError, match=f"{task}/subspace.safetensors.*{words}"):
        continues(folder)
    assert not list(folder.glob("tasks/02-*"))


def test_columns_that_an_earlier_task_has_are_refused(folder):
    first = load_file(folder / "tasks/00-one/subspace.safetensors")
    edit_tensors(folder / "tasks/01-two/subspace.safetensors", damaged(lambda _: first[f"{QUERY}.columns"][:, :2]))
    rehash(folder)
    with pytest.raises(ValueError, match=r"01-two/subspace.safetensors.*not orthonormal, to each other and to those"):
        PublishedSequence.open(folder).bases()


# ---- paths ----


@pytest.mark.parametrize(
    "link",
    [
        "tasks/02-three",
        "tasks/.02-three.tmp",
        "checkpoints",
        "checkpoints/three",
        "checkpoints/three/checkpoint-6/optimizer.pt",
        "adapter_model.safetensors",
        "training_args.bin",
        "README.md",
        ".run.lock",
        ".append.lock",
    ],
)
def test_nothing_is_written_through_a_link(folder, tmp_path, link):
    outside = tmp_path / "outside"
    target = outside if link in ("tasks/02-three", "checkpoints", "checkpoints/three") else outside / "file"
    outside.mkdir()
    (outside / "file").write_text("mine")
    path = folder / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(ValueError, match=f"{link} is a symbolic link to"):
        continues(folder)
    assert (outside / "file").read_text() == "mine"
    assert [file.name for file in outside.iterdir()] == ["file"]


@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/three"])
def test_links_within_a_folder_lead_nowhere_either(folder, tmp_path, link):
    (folder / "inside").mkdir()
    (folder / "inside" / "three").symlink_to(tmp_path)
    path = folder / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(folder / ("inside" if link == "checkpoints" else "tasks/00-one"))
    with pytest.raises(ValueError, match=f"{link} is a symbolic link to"):
        continues(folder)


def test_links_within_a_folder_and_to_the_folder_itself_are_fine(folder, tmp_path):
    (folder / "newest").symlink_to(folder / "tasks/01-two")
    (tmp_path / "link").symlink_to(folder)
    check_links(tmp_path / "link")
    assert continues(tmp_path / "link").global_step == 6


# ---- sizes ----


def test_more_tasks_than_any_model_holds_are_refused_at_once(folder):
    index = json.loads((folder / INDEX).read_text())
    task = index["tasks"][0]
    many = []
    for number in range(2 * MAX_TASKS):
        place = f"tasks/{number:02d}-t{number}"
        files = {name.replace(task["folder"], place): digest for name, digest in task["files"].items()}
        many.append(task | {"name": f"t{number}", "folder": place, "files": files})
    edit_json(folder / INDEX, tasks=many)
    refuses(lambda base: load_sequence(base, folder), folder, f"tasks: .*at most {MAX_TASKS} items")


# ---- text ----


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (INDEX, {"bases": "<script>alert(1)</script>"}),
        (INDEX, {"bases": "a\n# Heading"}),
        ("base_model", {"architecture": "Bert\nimport os\nos.system('rm')"}),
        ("base_model", {"name_or_path": "x'); import os; ('"}),
        ("base_model", {"name_or_path": "/home/me/secret"}),
        ("base_model", {"name_or_path": "../up"}),
        ("base_model", {"revision": "main', trust_remote_code=True)#"}),
        ("base_model", {"fingerprint": "`"}),
        ("training", {"optim": "<img src=x onerror=alert(1)>"}),
        ("training", {"versions": {"torch": "[click](javascript:alert(1))"}}),
        ("training", {"versions": {"|": "1"}}),
        ("training", {"eblora_config": {"method": "a | b"}}),
        ("training", {"eblora_config": {"method": {"nested": 1}}}),
        ("training", {"task": {"**bold**": 1}}),
        ("training", {"learning_rate": "`1`"}),
        ("training", {"seed": "0\n\n# Heading"}),
    ],
)
def test_text_that_is_not_what_it_should_be_reaches_no_card(folder, file, change):
    if file == "base_model":
        change = {"base_model": json.loads((folder / INDEX).read_text())["base_model"] | change}
    edit_json(folder / ("tasks/00-one/training.json" if file == "training" else INDEX), **change)
    rehash(folder)
    with pytest.raises(ValueError, match=r"is not a readable (index|record)"):
        render_card(PublishedSequence.open(folder), "me/seq")


# ---- checkpoints ----


class Planted:
    """A pickle that runs a command when it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


REFUSED = r"(?i)weights.only|unsupported|invalid|magic"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, name):
    options = {"tasks": ("one",), "save_strategy": "steps", "save_steps": 3}

    class StopError(Exception):
        pass

    class Stops(ContinualEBLoRATrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise StopError
            return super().training_step(*args, **kwargs)

    with pytest.raises(StopError):
        make_trainer(tmp_path / "out", cls=Stops, **options).train()
    (path,) = (tmp_path / "out").glob("checkpoints/one/checkpoint-3")
    planted = Planted(f"touch {tmp_path / 'ran'}")
    for plant in (lambda path: path.write_bytes(pickle.dumps(planted)), lambda path: torch.save(planted, path)):
        plant(path / name)
        with (
            contextlib.suppress(Exception) if name == "training_args.bin" else pytest.raises(Exception, match=REFUSED)
        ):
            make_trainer(tmp_path / "out", **options).train(resume_from_checkpoint=True)
        assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_tensors_is_not_read(folder):
    state = load_file(folder / "tasks/01-two/adapter_model.safetensors")
    torch.save(state, folder / "tasks/01-two/adapter_model.bin")
    (folder / "tasks/01-two/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors of the task 'two' is missing"):
        load_sequence(make_model("bert"), folder)
