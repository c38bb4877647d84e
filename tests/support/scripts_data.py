"""Tiny models, tokenizers and data on disk for the tests of the example scripts, which load them by path."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [f"w{i}" for i in range(40)] + ["user", "assistant", "a", "photo", "of", "red", "green", "blue", "dark"]
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %} </s> {% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "dark": (20, 20, 20)}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word; texts begin with <s> and end with </s>, as CLIP needs it."""
    tokenizer = tokenizers.Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def image_processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
    )


def llama_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def clip_vision_config() -> dict:
    return {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }


def save_model(kind: str, folder: Path) -> str:
    """Saves a tiny model with what belongs to it, and returns the path."""
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
        )
        model, others = transformers.BertModel(config), [make_tokenizer()]
    elif kind == "vit":
        config = transformers.ViTConfig(**clip_vision_config())
        processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
        model, others = transformers.ViTModel(config), [processor]
    elif kind == "llama":
        model, others = transformers.LlamaForCausalLM(llama_config()), [make_tokenizer()]
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=len(VOCABULARY),
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
        model, others = transformers.T5ForConditionalGeneration(config), [make_tokenizer()]
    elif kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**clip_vision_config()),
            text_config=llama_config(),
            image_token_id=VOCABULARY["<image>"],
            vision_feature_layer=-1,
        )
        processor = transformers.LlavaProcessor(
            image_processor=image_processor(),  # as that of LLaVA 1.5 is saved
            tokenizer=make_tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        model, others = transformers.LlavaForConditionalGeneration(config), [processor]
    elif kind == "clip":
        text = {key: value for key, value in clip_vision_config().items() if key not in ("image_size", "patch_size")}
        config = transformers.CLIPConfig(
            text_config=text
            | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2},
            vision_config=clip_vision_config(),
            projection_dim=16,
        )
        model, others = transformers.CLIPModel(config), [make_tokenizer(), image_processor()]
    else:
        raise ValueError(kind)
    for part in (model, *others):
        part.save_pretrained(folder)
    return str(folder)


def words(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 40, size=4)) for _ in range(count)]


def write_csv(path: Path, labels: list[str], seed: int = 0) -> None:
    rows = [f"{text},{labels[i % len(labels)]}" for i, text in enumerate(words(seed, 12))]
    path.write_text("\n".join(["sentence,label", *rows]) + "\n")


def write_images(folder: Path, classes: list[str], size: int = 6) -> None:
    """An image folder: `folder/train/red/0.png`."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(size):
                noise = rng.integers(-20, 20, size=(8, 8, 3))
                pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def write_json(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


def instructions() -> list[dict]:
    return [{"instruction": text, "input": "w1", "output": text.split()[0]} for text in words(0, 12)]


def chats() -> list[dict]:
    """Two questions and answers each."""
    turns = [[("user", text), ("assistant", text.split()[0])] * 2 for text in words(1, 12)]
    return [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]


def llava_records(images: list[str], seed: int = 0) -> list[dict]:
    return [
        {
            "id": str(i),
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": question.split()[0]},
            ],
        }
        for i, (image, question) in enumerate(zip(images, words(seed, len(images)), strict=True))
    ]


def llava_test_records(images: list[str], seed: int = 0, *, answers: bool = True) -> list[dict]:
    return [
        {"question_id": i, "image": image, "text": question} | ({"answer": question.split()[0]} if answers else {})
        for i, (image, question) in enumerate(zip(images, words(seed, len(images)), strict=True))
    ]


def captions(count: int, seed: int = 0) -> dict:
    """Two references for each row of a test file, as COCO has them."""
    texts = words(seed, count)
    return {
        "images": [{"id": i + 1} for i in range(count)],
        "annotations": [
            {"id": 2 * i + j, "image_id": i + 1, "caption": text}
            for i, line in enumerate(texts)
            for j, text in enumerate((line, line.split()[0]))
        ],
    }
