"""Evaluation by generation: the text that a model sees, what it answers, and how that is scored."""

import importlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

from ..support import scripts_data

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIGS = SCRIPTS / "configs"
# the conversation of LLaVA 1.5 as its authors trained it: vicuna_v1, a picture before the first question
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT = f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return scripts_data.save_model("llava", tmp_path_factory.mktemp("llava"))


def processor(scripts, llava: str, config: str):
    """The processor as a benchmark's configuration makes it, and the prompt that goes before."""
    values = yaml.safe_load((CONFIGS / config).read_text())
    keys = ("chat_template", "system_prompt", "pad_images")
    arguments = scripts("run_vlm").VisionLanguageArguments(llava, **{key: values[key] for key in keys})
    return arguments.processor(), arguments.system_prompt


@pytest.mark.parametrize("config", ["ucit.yaml", "mllm-dcl.yaml"])
def test_the_conversation_is_the_released_one(config, scripts, llava):
    made, system = processor(scripts, llava, config)
    messages = scripts("run_vlm").as_messages({"text": "What is it?", "answer": "A cat"}, system)
    render = scripts("answers").render_conversation
    text, spans = render(made, messages)
    assert text == f"{PROMPT} A cat</s>"
    assert [text[a:b] for a, b in spans] == [" A cat</s>"]
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat"), ("human", "Black?"), ("gpt", "No")]
    record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    text, spans = render(made, scripts("run_vlm").as_messages(record, system))
    assert text == f"{PROMPT} A cat</s>USER: Black? ASSISTANT: No</s>"
    asked = made.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == PROMPT


def test_pictures_are_padded_with_the_mean(scripts, llava):
    made, _ = processor(scripts, llava, "ucit.yaml")
    wide = Image.new("RGB", (8, 4), (255, 255, 255))
    pixels = torch.as_tensor(np.asarray(made.image_processor([wide], return_tensors="pt")["pixel_values"]))[0]
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, 0].abs().max() < 0.05  # the mean, normalised, in the rows above
    assert pixels[:, 4].min() > 1.0  # white


def test_what_the_processor_cannot_do_is_refused(scripts, llava, tmp_path):
    arguments = scripts("run_vlm").VisionLanguageArguments(
        llava, system_prompt="Be brief.", chat_template="nowhere.jinja"
    )
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.jinja and no .*scripts/nowhere\.jinja"):
        arguments.processor()
    arguments.chat_template = str(tmp_path / "own.jinja")
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content[0].text }}")
    with pytest.raises(ValueError, match=r"leaves out system_prompt='Be brief\.'"):
        arguments.processor()
    with pytest.raises(ValueError, match="ViTImageProcessor is no processor of a model of the LLaVA"):
        arguments._padding(type("ViTImageProcessor", (), {})())


def test_a_batch_of_questions_ends_with_the_prompt(scripts, llava, tmp_path):
    made, system = processor(scripts, llava, "ucit.yaml")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    records = [{"image": str(tmp_path / "0.png"), "text": t, "question": i} for i, t in enumerate(["w1 w2 w3", "w4"])]
    batch = scripts("run_vlm").AnswerCollator(made, system)(records)
    assert batch["questions"].tolist() == [0, 1]
    assert "labels" not in batch
    tokens = [made.tokenizer.convert_ids_to_tokens(row)[-3:] for row in batch["input_ids"]]
    assert len({tuple(row[1:]) for row in tokens}) == 1  # padded on the left, both end alike
    assert batch["attention_mask"][1, 0] == 0


def task_data(scripts, rows: list[dict], **options):
    task = scripts("common").Task("one", train_dataset=())
    return scripts("common").TaskData(task, None, datasets.Dataset.from_list(rows), options)


ROWS = [{"image": f"{i}.png", "text": f"q{i}", "answer": answer} for i, answer in enumerate(["Yes", "B", "No"])]


def test_suffixes_by_answer_and_the_positions_of_questions(scripts):
    suffixes = yaml.safe_load((CONFIGS / "mllm-dcl.yaml").read_text())["tasks"][4]["test_suffix"]
    task = task_data(scripts, ROWS, scorer="choice", test_suffix=suffixes)
    questions = ["one before"]
    scripts("generation").ask(task, questions, Path())
    yes, letter = (
        " Only answer with yes or no directly.",
        " Answer with the given letter directly, e.g., A, B, C, D.",
    )
    assert list(task.validation["text"]) == ["q0" + yes, "q1" + letter, "q2" + yes]
    assert list(task.validation["question"]) == [1, 2, 3]
    assert [question.record for question in questions[1:]] == ROWS  # as they are in the file


def test_a_suffix_under_an_unquoted_yes_is_refused(scripts):
    task = task_data(scripts, ROWS, scorer="choice", test_suffix=yaml.safe_load("{Yes: ' Be brief.'}"))
    with pytest.raises(ValueError, match="unquoted Yes or No"):
        scripts("generation").ask(task, [], Path())


def test_a_test_file_without_answers_leaves_its_task_out(scripts, monkeypatch):
    rows, said = [{key: row[key] for key in ("image", "text")} for row in ROWS], []
    monkeypatch.setattr(scripts("generation").logger, "warning", said.append)
    task = task_data(scripts, rows, scorer="equal")
    scripts("generation").ask(task, [], Path())
    assert task.validation is None
    assert "'one' has no column 'answer'" in said[0]


def test_captions_need_a_reference_for_every_row(scripts, tmp_path):
    ask, rows = scripts("generation").ask, [{key: row[key] for key in ("image", "text")} for row in ROWS]
    with pytest.raises(ValueError, match="scored as captions: name the file of its 'references'"):
        ask(task_data(scripts, rows, scorer="caption"), [], tmp_path)
    scripts_data.write_json(tmp_path / "two.json", scripts_data.captions(2))
    with pytest.raises(ValueError, match=r"no caption for 1 of the 3 test rows of the task 'one', row 3"):
        ask(task_data(scripts, rows, scorer="caption", references="two.json"), [], tmp_path)
    scripts_data.write_json(tmp_path / "three.json", scripts_data.captions(3))
    questions: list = []
    ask(task_data(scripts, rows, scorer="caption", references="three.json"), questions, tmp_path)
    assert [len(question.references) for question in questions] == [2, 2, 2]
    with pytest.raises(ValueError, match="scorer='acuracy': expected one of equal, word"):
        ask(task_data(scripts, rows, scorer="acuracy"), [], tmp_path)


def test_answers_are_decoded_and_scored_by_their_task(scripts):
    generation, tokenizer = scripts("generation"), scripts_data.make_tokenizer()
    questions = [generation.Question("equal", {"answer": answer}, []) for answer in ("w1 w2", "w3", "w4")]
    ids = tokenizer.convert_tokens_to_ids
    predictions = np.array([[ids("w1"), ids("w2"), ids("</s>")], [ids("w9"), ids("</s>"), -100]])
    prediction = transformers.EvalPrediction(predictions=predictions, label_ids=np.array([0, 2]))
    assert generation.AnswerScores(tokenizer, questions)(prediction) == {"score": 0.5}


@pytest.mark.parametrize(("total", "given", "expected"), [(None, 3, 3), (64, 1, 8), (64, 8, 8)])
def test_the_total_batch_sets_the_accumulation(total, given, expected, scripts, tmp_path):
    args = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=given, use_cpu=True
    )
    scripts("arguments").accumulate(args, total)
    assert args.gradient_accumulation_steps == expected


def test_a_total_batch_that_cannot_be_is_refused(scripts, tmp_path):
    args = transformers.TrainingArguments(tmp_path, per_device_train_batch_size=8, use_cpu=True)
    with pytest.raises(ValueError, match=r"total_train_batch_size=60: 1 process\(es\) with 8 samples each take 8"):
        scripts("arguments").accumulate(args, 60)
    args.gradient_accumulation_steps = 4
    with pytest.raises(ValueError, match=r"makes 8 accumulation.*gradient_accumulation_steps=4 is given as well"):
        scripts("arguments").accumulate(args, 64)
    assert json.loads(args.to_json_string())["gradient_accumulation_steps"] == 4
