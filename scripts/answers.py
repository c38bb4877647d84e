"""Answers in a text: where they are in a conversation, labels for their tokens alone, and how many are right."""

from typing import Any

IGNORED = -100  # label of a token that the loss leaves out


def render_conversation(processor: Any, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation as the text of a chat template.

    Args:
        processor: A tokenizer or processor with a chat template.
        messages (`list[dict]`): Role and content of each turn, the last one the assistant's.

    Returns:
        The text, ended by the end-of-sequence token, and from where to where each answer goes.
    """

    def render(count: int, prompt: bool) -> str:
        return processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"A conversation ends with the assistant's answer, got {messages!r}.")
    end_of_sequence = getattr(processor, "tokenizer", processor).eos_token
    text, spans = render(len(messages), False).rstrip(), []
    if not text.endswith(end_of_sequence):
        text += end_of_sequence
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = render(i, True), render(i + 1, False)
            if not (text.startswith(start) and text.startswith(end.rstrip())):
                raise ValueError(
                    f"The chat template rewrites earlier turns, so that an answer cannot be found in {text!r}. Keep "
                    "one answer per conversation, or use another template."
                )
            spans.append((len(start), len(end)))
    spans[-1] = (spans[-1][0], len(text))
    return text, spans


def encode_answers(tokenizer: Any, text: str, spans: list[tuple[int, int]], **options) -> dict[str, list[int]]:
    """
    Token ids of a text, and labels for the tokens inside the spans alone.

    Args:
        tokenizer: With offsets (a "fast" one).
        text (`str`), spans (`list[tuple[int, int]]`): As of [`render_conversation`].
        options: For the tokenizer.
    """
    # many chat templates write the first token themselves
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, **options)
    offsets = encoded.pop("offset_mapping")
    inside = [any(start < b and end > a for a, b in spans) and end > start for start, end in offsets]
    labels = [token if answer else IGNORED for token, answer in zip(encoded["input_ids"], inside, strict=True)]
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def answer_accuracy(prediction) -> dict[str, float]:
    """
    `accuracy`, the share of right tokens in the answers, and `exact_match`, that of answers right in every token.

    Each token is predicted from the true ones before it; greedy decoding gives the same answer exactly where all
    are right.
    """
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != IGNORED
    right = (predicted == labels) & counted
    exact = right.sum(axis=1) == counted.sum(axis=1)
    return {"accuracy": float(right.sum() / counted.sum()), "exact_match": float(exact.mean())}
