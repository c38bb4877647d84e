"""The example scripts as a user starts them, on tiny models and data, and the benchmark configurations beside them."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.analysis.table import BENCHMARKS, benchmark_table

from ..support import HUB_PORT, scripts_data
from ..support.hub_server import TOKEN, HubServer

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIGS = SCRIPTS / "configs"
FEW = [
    "--max_steps",
    "3",
    "--per_device_train_batch_size",
    "4",
    "--use_cpu",
    "--lora_r",
    "4",
    "--disable_tqdm",
    "True",
]
MODELS = {
    "run_text_classification": "bert",
    "run_image_classification": "vit",
    "run_clm": "llama",
    "run_seq2seq": "t5",
    "run_vlm": "llava",
    "run_clip": "clip",
}
BASES = {
    "run_text_classification": transformers.AutoModelForSequenceClassification,
    "run_image_classification": transformers.AutoModelForImageClassification,
    "run_clm": transformers.AutoModelForCausalLM,
    "run_seq2seq": transformers.AutoModelForSeq2SeqLM,
    "run_vlm": transformers.AutoModelForImageTextToText,
    "run_clip": transformers.CLIPModel,
}


def files(train: str, validation: str | None = None) -> dict:
    return {"data_files": {"train": train, "validation": validation or train}}


TEXT = {"columns": {"text": "sentence"}}
FOLDER = {"splits": {"validation": "test"}}
TASKS = {
    "run_text_classification": [
        {"name": "one", **files("one.csv"), **TEXT},
        {"name": "two", **files("two.csv"), **TEXT, "max_steps": 2, "learning_rate": "1e-3"},
    ],
    "run_image_classification": [
        {"name": "one", "dataset": "one", **FOLDER},
        {"name": "two", "dataset": "two", **FOLDER},
    ],
    "run_clm": [{"name": "one", **files("instructions.json")}, {"name": "two", **files("chats.json")}],
    "run_seq2seq": [
        {"name": "one", **files("one.csv"), **TEXT, "prompt": "w1 {labels} {text} w2"},
        {"name": "two", **files("two.csv"), **TEXT},
    ],
    "run_vlm": [
        {"name": "one", **files("llava.json", "llava_test.json"), "image_dir": "one"},
        {"name": "two", **files("llava.json"), "image_dir": "one"},
    ],
    "run_clip": [
        {"name": "one", "dataset": "one", **FOLDER},
        {"name": "two", "dataset": "two", **FOLDER, "prompt": "photo of {}", "class_names": {"dark": "w1"}},
    ],
}
LABELS = {"run_text_classification": ["x", "y", "z"], "run_image_classification": ["blue", "dark", "green", "red"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with all models, data and task files."""
    root = tmp_path_factory.mktemp("world")
    for kind in MODELS.values():
        scripts_data.save_model(kind, root / kind)
    scripts_data.write_csv(root / "one.csv", ["x", "y"])
    scripts_data.write_csv(root / "two.csv", ["y", "z"], seed=1)
    scripts_data.write_csv(root / "strange.csv", ["y", "never seen"], seed=2)
    scripts_data.write_images(root / "one", ["red", "green"])
    scripts_data.write_images(root / "two", ["blue", "dark", "red"])
    scripts_data.write_json(root / "instructions.json", scripts_data.instructions())
    scripts_data.write_json(root / "chats.json", scripts_data.chats())
    (root / "broken.json").write_text('[{"messages": ')
    (root / "broken.yaml").write_text("- {name: one")
    questions = [{"messages": chat["messages"][:1]} for chat in scripts_data.chats()]
    scripts_data.write_json(root / "questions.json", questions)
    images = [f"train/{colour}/{i}.png" for colour in ("red", "green") for i in range(6)]
    scripts_data.write_json(root / "llava.json", scripts_data.llava_records(images))
    scripts_data.write_json(root / "llava_test.json", scripts_data.llava_test_records(images))
    for script, tasks in TASKS.items():
        (root / f"{script}.yaml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    return root


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Imports a script, with its caches in a folder of this test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    verbosity = transformers.utils.logging.get_verbosity()
    yield importlib.import_module
    transformers.utils.logging.set_verbosity(verbosity)


def start(script: str, *arguments: str, cache: Path, processes: int = 1) -> None:
    """Runs a script in processes of its own, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPTS / f"{script}.py"), *arguments]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def flags(script: str, world: Path, out: Path, tasks: Path | None = None) -> list[str]:
    model = ["--model_name_or_path", str(world / MODELS[script]), "--output_dir", str(out), *FEW]
    return [*model, "--tasks", str(tasks or world / f"{script}.yaml"), "--data_dir", str(world)]


def check_published(out: Path, names: list[str], metric: str = "accuracy") -> None:
    """The folder holds the tasks, and the accuracies of the last row are in all_results.json."""
    published = PublishedSequence.open(out)
    assert published.names == names
    results = json.loads((out / "all_results.json").read_text())
    assert {name: results[f"eval_{name}_{metric}"] for name in names} == published.tasks[-1].metrics
    assert all(0.0 <= value <= 1.0 for value in published.tasks[-1].metrics.values())
    assert results["train_MFN"] == pytest.approx(np.mean([results[f"eval_{name}_{metric}"] for name in names]))
    assert {entry["task"] for entry in json.loads((out / "trainer_state.json").read_text())["log_history"]} == set(
        names
    )


def load_with_peft(script: str, base: Path, out: Path) -> PeftModel:
    """What anyone loads without this package; a key that fits nowhere is an error."""
    head = {"num_labels": len(LABELS[script])} if script in LABELS else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(BASES[script].from_pretrained(base, **head), out)


@pytest.mark.parametrize("script", MODELS)
def test_a_script_learns_two_tasks_and_publishes_plain_lora(script, world, tmp_path):
    out = tmp_path / "out"
    start(script, *flags(script, world, out), cache=tmp_path / "cache")
    check_published(out, ["one", "two"])
    model = load_with_peft(script, world / MODELS[script], out)
    updates = {name: value for name, value in model.named_parameters() if ".lora_B." in name}
    assert updates
    assert all(value.any() for value in updates.values())
    if script == "run_vlm":
        assert all("language_model" in name for name in updates)
    if script == "run_text_classification":
        assert [task.steps for task in PublishedSequence.open(out).tasks] == [3, 2]
        record = json.loads((out / "tasks/01-two/training.json").read_text())
        assert record["learning_rate"] == 1e-3


def test_a_yaml_file_instead_of_flags_and_the_order_of_labels(scripts, world, tmp_path, monkeypatch):
    arguments = {
        "model_name_or_path": str(world / "bert"),
        "tasks": TASKS["run_text_classification"],  # the list itself
        "data_dir": str(world),
        "output_dir": str(tmp_path / "out"),
        "labels": ["z", "y", "x", "w"],
        "learning_rate": "2e-4",  # what YAML makes of 2e-4
        "max_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "lora_r": 4,
        "method": "ebo",
    }
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    monkeypatch.setattr(sys, "argv", ["run_text_classification.py", str(tmp_path / "arguments.yaml")])
    scripts("run_text_classification").main()
    check_published(tmp_path / "out", ["one", "two"])
    record = json.loads((tmp_path / "out/tasks/00-one/training.json").read_text())
    assert record["learning_rate"] == 2e-4
    assert record["eblora_config"] == {"method": "ebo"}
    adapter = PublishedSequence.open(tmp_path / "out").adapters(["one"])[0]
    assert {len(value) for name, value in adapter.items() if "classifier" in name} == {4}


def test_a_later_run_continues_and_an_interrupted_one_resumes(scripts, world, tmp_path, monkeypatch):
    first, third = tmp_path / "first", tmp_path / "third.json"
    third.write_text(json.dumps([{"name": "three", **files("chats.json")}]))
    main = scripts("run_clm").main
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *flags("run_clm", world, first)])
    main()
    before = {path: path.read_bytes() for path in (first / "tasks").rglob("*.*")}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume_from_checkpoint", "True"])
    main()  # both tasks are there already
    continued = [*flags("run_clm", world, first, third), "--sequence", str(first)]
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *continued])
    main()
    published = PublishedSequence.open(first)
    assert published.names == ["one", "two", "three"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_finished_tasks_are_pushed(scripts, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushing = ["--push_to_hub", "True", "--hub_model_id", "me/sequence"]
    monkeypatch.setattr(sys, "argv", ["run_clip.py", *flags("run_clip", world, tmp_path / "out"), *pushing])
    with HubServer(HUB_PORT) as server:
        scripts("run_clip").main()
        repo = server.repos["me/sequence"]
        assert set(repo.tags) == {"task-00-one", "task-01-two"}
        pushed = set(repo.resolve("main").files)
    assert "adapter_model.safetensors" in pushed
    assert not [name for name in pushed if "checkpoint" in name or name.endswith("_results.json")]


# ---- wrong input ----


def text_task(**changes) -> list[dict]:
    return [{"name": "one", **files("one.csv"), **TEXT} | changes]


WRONG = {
    "no file of tasks": ("run_clm", "nowhere.yaml", "task file .*nowhere.yaml' does not exist"),
    "a broken file of tasks": ("run_clm", "broken.yaml", "task file .*broken.yaml' cannot be read"),
    "not a list": ("run_clm", {"tasks": 1}, "must hold a list, got a dict"),
    "unknown key": ("run_text_classification", text_task(epochs=3), "'one' has the key.s. epochs; known are"),
    "no data": ("run_text_classification", [{"name": "one"}], "either 'dataset' or 'data_files'"),
    "a file that is not there": ("run_text_classification", text_task(**files("no.csv")), "no.csv' does not exist"),
    "a number": (
        "run_text_classification",
        text_task(learning_rate="fast"),
        "learning_rate of the task 'one' is 'fast'",
    ),
    "a name twice": ("run_text_classification", text_task() * 2, "Two tasks are named 'one'"),
    "a mapping": (
        "run_text_classification",
        text_task(data_files="one.csv"),
        "'data_files' of the task 'one' is 'one.csv'",
    ),
    "no answer": ("run_clm", [{"name": "one", **files("questions.json")}], "ends with the assistant's answer"),
    "a column": ("run_text_classification", text_task(columns={}), "needs the columns 'text', 'label', but its train"),
    "a label": (
        "run_text_classification",
        text_task(**files("one.csv", "strange.csv")),
        "validation data of the task 'one' has the label.s. 'never seen'",
    ),
    "no epochs": (
        "run_clm",
        [{"name": "one", **files("chats.json"), "num_train_epochs": "auto"}],
        "num_train_epochs of the",
    ),
    "broken data": ("run_clm", [{"name": "one", **files("broken.json")}], "'one': the train data, .*broken.json"),
    "a split": (
        "run_clip",
        [{"name": "one", "dataset": "one"}],
        "'one': the validation data, split 'validation' of .* cannot be loaded: Unknown split",
    ),
    "a class": (
        "run_clip",
        [{"name": "one", "dataset": "one", **FOLDER, "class_names": {"pink": "w1"}}],
        r"renames \['pink'\]",
    ),
    "an image": ("run_vlm", [{"name": "one", **files("llava.json")}], "12 image.s. that are not in .* 'image_dir'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_named_before_anything_is_trained(wrong, scripts, world, tmp_path, monkeypatch):
    script, tasks, message = WRONG[wrong]
    if not isinstance(tasks, str):
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    path = world / tasks if isinstance(tasks, str) else tmp_path / "tasks.yaml"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags(script, world, tmp_path / "out", path)])
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        scripts(script).main()
    assert not (tmp_path / "out").exists()


# ---- what the loss and the metric see ----


def answers_in(batch: dict, row: int, tokenizer) -> str:
    labels = batch["labels"][row]
    assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
    return tokenizer.decode(labels[labels != -100])


def test_labels_are_on_every_answer_and_nothing_else(scripts):
    answers, tokenizer = scripts("answers"), scripts_data.make_tokenizer()
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    text, spans = answers.render_conversation(tokenizer, [{"role": role, "content": words} for role, words in turns])
    assert [text[a:b].split() for a, b in spans] == [["w3", "</s>"], ["w5", "w6", "</s>"]]
    encoded = answers.encode_answers(tokenizer, text, spans)
    counted = [token for token in encoded["labels"] if token != answers.IGNORED]
    assert tokenizer.decode(counted) == "w3 </s> w5 w6 </s>"


def test_a_template_that_ends_no_answer_gets_an_end(scripts):
    answers, tokenizer = scripts("answers"), scripts_data.make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(" </s> ", " ")
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    text, spans = answers.render_conversation(tokenizer, messages)
    assert text.endswith("w2</s>")
    assert text[slice(*spans[-1])].strip() == "w2</s>"


def test_a_batch_of_images_has_labels_on_the_answers(scripts, world):
    run_vlm = scripts("run_vlm")
    processor = transformers.AutoProcessor.from_pretrained(world / "llava")
    image = str(world / "one/train/red/0.png")
    several = [("human", "<image>\nw1"), ("gpt", "w2"), ("human", "w3 w4"), ("gpt", "w5")]
    records = [
        {"image": image, "text": "w1 w2 w3", "answer": "w4"},
        {"image": image, "conversations": [{"from": role, "value": value} for role, value in several]},
    ]
    batch = run_vlm.AnswerCollator(processor)(records)
    tokenizer = processor.tokenizer
    assert answers_in(batch, 0, tokenizer) == "w4 </s>"
    assert answers_in(batch, 1, tokenizer) == "w2 </s> w5 </s>"
    assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [
        4,
        4,
    ]  # 2 x 2 patches


def test_the_metric_of_answers(scripts):
    labels = np.array([[-100, -100, 5, 6], [-100, 7, 8, -100]])
    predicted = np.array([[9, 5, 6, 9], [7, 9, 9, 9]])  # at t for t + 1: both right; one right, one wrong
    prediction = transformers.EvalPrediction(predictions=predicted, label_ids=labels)
    assert scripts("answers").answer_accuracy(prediction) == {"accuracy": 3 / 4, "exact_match": 1 / 2}


def test_the_loss_of_clip_is_a_mean_over_the_whole_batch_of_a_step(scripts):
    loss = scripts("run_clip").nearest_text_loss
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    whole = -(logits - logits.exp().sum(1, keepdim=True).log())[range(6), labels].mean()
    parts = [loss({"logits_per_image": logits[part]}, labels[part], 6) for part in (slice(4), slice(4, 6))]
    assert torch.allclose(sum(parts), whole, atol=1e-14)
    assert torch.allclose(loss({"logits_per_image": logits}, labels), whole, atol=1e-14)


# ---- the benchmarks ----

MTIL = {
    1: "Aircraft Caltech101 CIFAR100 DTD EuroSAT Flowers Food MNIST OxfordPet StanfordCars SUN397",
    2: "StanfordCars Food MNIST OxfordPet Flowers SUN397 Aircraft Caltech101 DTD EuroSAT CIFAR100",
}


def parsed(scripts, monkeypatch, folder: Path, config: str) -> tuple:
    """A configuration as its script reads it; bf16 needs a GPU or the word that there is none."""
    (folder / config).write_text((CONFIGS / config).read_text() + "\nuse_cpu: true\n")
    monkeypatch.setattr(sys, "argv", ["run.py", str(folder / config)])
    if config.startswith("mtil"):
        return scripts("arguments").parse_arguments()
    return scripts("arguments").parse_arguments(scripts("run_vlm").VisionLanguageArguments)


@pytest.mark.parametrize(
    ("config", "rank", "alpha", "batch", "epochs", "rates"),
    [
        ("ucit", 16, 32, 64, [3, 1, 3, 3, 3, 1], {2e-4: 5, 2e-5: 1}),
        ("mllm-dcl", 32, 160, 128, [3, 3, 1, 2, 1], {2e-5: 5}),
    ],
)
def test_the_released_settings(config, rank, alpha, batch, epochs, rates, scripts, monkeypatch, tmp_path):
    model, data, training, eblora = parsed(scripts, monkeypatch, tmp_path, f"{config}.yaml")
    own = {"head_learning_rate": 2e-5} if config == "ucit" else {}  # of the projector
    assert eblora == dataclasses.replace(EBLoRAConfig.preset(config), **own)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (rank, alpha, 0.05)
    assert data.total_train_batch_size == batch
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch  # one process here
    assert [task["num_train_epochs"] for task in data.tasks] == epochs
    given = [task.get("learning_rate", training.learning_rate) for task in data.tasks]
    assert {rate: given.count(rate) for rate in set(given)} == rates


@pytest.mark.parametrize("order", MTIL)
def test_the_orders_of_mtil(order, scripts, monkeypatch, tmp_path):
    _, data, _, eblora = parsed(scripts, monkeypatch, tmp_path, f"mtil-order-{order}.yaml")
    assert [task["name"] for task in data.tasks] == MTIL[order].split()
    assert all("{}" in task["prompt"] for task in data.tasks)
    assert eblora == EBLoRAConfig()


def tiny(config: str, count: int, model: Path, root: Path, **changes) -> list[dict]:
    """Writes a benchmark's configuration for a tiny model as `arguments.yaml` beside its data; returns its tasks."""
    small = {"dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True, "lora_r": 4}
    paths = {"model_name_or_path": str(model), "data_dir": str(root), "output_dir": str(root / "out")}
    arguments = yaml.safe_load((CONFIGS / config).read_text()) | small | paths | changes
    arguments["tasks"] = arguments["tasks"][:count]
    (root / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    return arguments["tasks"]


@pytest.mark.parametrize(
    ("config", "count"),
    [("ucit.yaml", 3), pytest.param("ucit.yaml", 6, marks=pytest.mark.slow), ("mllm-dcl.yaml", 5)],
)
def test_a_benchmark_of_vision_language_models_runs(config, count, world, tmp_path):
    """In the layout of the released data; and no column of its table is void."""
    if config == "ucit.yaml":
        pytest.importorskip("pycocoevalcap")
        if shutil.which("java") is None:
            pytest.skip("the scores of captions need Java")
    few = {"per_device_train_batch_size": 4, "total_train_batch_size": 8, "max_new_tokens": 4}
    tasks = tiny(config, count, world / "llava", tmp_path, **few)
    for i, task in enumerate(tasks):
        images = [f"{task['name']}/AI2D_{j}.png" for j in range(8)]
        for image in images:
            path = tmp_path / task["image_dir"] / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((world / f"one/train/red/{i % 6}.png").read_bytes())
        files, caption = task["data_files"], task["scorer"] == "caption"
        scripts_data.write_json(tmp_path / files["train"], scripts_data.llava_records(images, seed=i))
        records = scripts_data.llava_test_records(images, seed=i, answers=not caption)
        scripts_data.write_json(tmp_path / files["validation"], records)
        if caption:
            scripts_data.write_json(tmp_path / task["references"], scripts_data.captions(len(images), seed=i))
    start("run_vlm", str(tmp_path / "arguments.yaml"), cache=tmp_path / "cache")
    names = [task["name"] for task in tasks]
    check_published(tmp_path / "out", names, metric="score")
    published = PublishedSequence.open(tmp_path / "out")
    assert [task.steps for task in published.tasks] == [task["num_train_epochs"] for task in tasks]  # 8 rows a step
    assert all(set(task.metrics) == set(names) for task in published.tasks)
    assert set(json.loads((tmp_path / "out/zero_shot.json").read_text())) == set(names)
    logged = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    if config == "ucit.yaml":
        assert any("eval_vizwiz_CIDEr" in entry for entry in logged)
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/tasks").glob("*/training.json"))]
        rates = [record["task"].get("head_learning_rate") for record in records]
        assert rates == ([None] * 5 + [5e-6])[:count]
    table = benchmark_table([tmp_path / "out"], config.removesuffix(".yaml") if count == len(tasks) > 3 else None)
    assert set(table["rows"]) == {"Last", "Last, each with its own head", "Avg", "Transfer", "zero-shot"}
    void = [(name, i) for name, (row,) in table["rows"].items() for i, value in enumerate(row) if value is None]
    assert void == [("Transfer", 0)]  # nothing comes before the first task
    assert not {None} & {value for (value,) in table["means"].values()}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_standard_text_benchmark(order, scripts, monkeypatch, tmp_path):
    orders = {1: "dbpedia amazon yahoo agnews", 2: "dbpedia amazon agnews yahoo", 3: "yahoo amazon agnews dbpedia"}
    run = scripts("run_seq2seq")
    (tmp_path / "run.yaml").write_text((CONFIGS / f"text-order-{order}.yaml").read_text() + "\nuse_cpu: true\n")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "run.yaml")])
    parse = scripts("arguments").parse_arguments
    _, data, training, _ = parse(run.ModelArguments, run.TextArguments, run.Seq2SeqTrainingArguments)
    assert [task["name"] for task in data.tasks] == orders[order].split() == BENCHMARKS[f"text-order-{order}"].split()
    assert {task["name"]: len(task["labels"]) for task in data.tasks} == TEXT_LABELS
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert (training.learning_rate, training.lr_scheduler_type, training.num_train_epochs) == (1e-3, "constant", 1)


TEXT_LABELS = {"dbpedia": 14, "amazon": 5, "yahoo": 10, "agnews": 4}
# as O-LoRA's released code makes it of a row, its labels and the names of its task
QUESTION = """Task:TC
Dataset:agnews
What is the topic of the following paragraph? Choose one from the option.
Option: World, Sports, Business, Science or Technology\x20
A {text} about w1
Answer:"""


def test_the_question_is_the_released_one(scripts):
    run, tasks = scripts("run_seq2seq"), yaml.safe_load((CONFIGS / "text-order-1.yaml").read_text())["tasks"]
    rows = datasets.Dataset.from_list([{"text": "A {text} about w1", "label": "Sports"}] * 3)
    options = {key: tasks[3][key] for key in ("prompt", "labels")}
    task = scripts("common").TaskData(scripts("common").Task("agnews", ()), rows, rows, options)
    run.as_questions(task, 2)
    assert list(task.train["text"]) == [QUESTION] * 2
    assert list(task.validation["target"]) == ["Sports"] * 3
    wrong = datasets.Dataset.from_list([{"text": "w1", "label": "Cooking"}])
    with pytest.raises(ValueError, match=r"'agnews' has the label\(s\) 'Cooking'.*'World', 'Sports'"):
        run.as_questions(scripts("common").TaskData(task.task, wrong, wrong, options), None)
    with pytest.raises(ValueError, match=r"prompt='why\?', which needs \{text\}"):
        run.as_questions(scripts("common").TaskData(task.task, rows, rows, {"prompt": "why?"}), None)


def test_the_standard_text_benchmark_runs(world, tmp_path):
    few = {"total_train_batch_size": 8, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    tasks = tiny("text-order-3.yaml", 4, world / "t5", tmp_path, max_target_length=4, **few)
    for i, task in enumerate(tasks):
        for file in task["data_files"].values():
            texts = scripts_data.words(i, 8)
            rows = [{"label": task["labels"][j % 4], "sentence": text} for j, text in enumerate(texts)]
            scripts_data.write_json(tmp_path / file, rows)
    start("run_seq2seq", str(tmp_path / "arguments.yaml"), cache=tmp_path / "cache")
    check_published(tmp_path / "out", [task["name"] for task in tasks])
    table = benchmark_table([tmp_path / "out"], "text-order-3")
    assert set(table["rows"]) == {"Last", "Avg", "Transfer", "zero-shot"}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_seq2seq", "run_vlm"])
def test_generated_answers_count_once_on_two_processes(script, world, tmp_path):
    """Of five test rows the first alone is answered right: even batches repeat it, and it must not count twice."""
    if script == "run_seq2seq":
        texts = scripts_data.words(0, 5)
        model, tokenizer = (
            transformers.AutoModelForSeq2SeqLM.from_pretrained(world / "t5"),
            scripts_data.make_tokenizer(),
        )
        said = model.generate(**tokenizer(texts[0], return_tensors="pt"), max_length=51)[0]
        answers = [tokenizer.decode(said, skip_special_tokens=True).strip(), *["w39 w39 w39"] * 4]
        train = [{"text": text, "target": "w1"} for text in texts * 2]
        test = [{"text": text, "target": answer} for text, answer in zip(texts, answers, strict=True)]
        further, metric = {}, "accuracy"
    else:
        images = [str(world / f"one/train/red/{i}.png") for i in range(5)]
        train, test = scripts_data.llava_records(images * 2), scripts_data.llava_test_records(images)
        for row, record in enumerate(test):
            record["answer"] = "" if row == 0 else "never said"  # which is within any answer, and within none
        further, metric = {"scorer": "within"}, "score"
    scripts_data.write_json(tmp_path / "train.json", train)
    scripts_data.write_json(tmp_path / "test.json", test)
    (tmp_path / "tasks.yaml").write_text(
        yaml.safe_dump([{"name": "one", **files("train.json", "test.json"), **further}])
    )
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        start(
            script,
            *("--model_name_or_path", str(world / MODELS[script]), "--output_dir", str(out), *FEW),
            *("--tasks", str(tmp_path / "tasks.yaml"), "--data_dir", str(tmp_path), "--zero_shot", "True"),
            *("--per_device_eval_batch_size", "2", "--metric_for_best_model", metric),
            cache=tmp_path / "cache",
            processes=processes,
        )
        assert json.loads((out / "zero_shot.json").read_text()) == {"one": pytest.approx(1 / 5)}, processes


def test_mtil_runs(world, tmp_path):
    tasks = tiny("mtil-order-2.yaml", 4, world / "clip", tmp_path, max_steps=1, per_device_train_batch_size=4)
    for task in tasks:
        scripts_data.write_images(tmp_path / task["dataset"], ["red", "green"], size=2)
    start("run_clip", str(tmp_path / "arguments.yaml"), cache=tmp_path / "cache")
    check_published(tmp_path / "out", MTIL[2].split()[:4])
    assert set(benchmark_table([tmp_path / "out"])["rows"]) == {"Last", "Avg", "Transfer", "zero-shot"}
