"""Mutations of what a stranger may write: each is a clear error, or loads with the logits it should have."""

import contextlib
import copy
import json
import shutil
import signal
import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from eblora_hf import load_sequence
from eblora_hf.published.index import INDEX, Index
from eblora_hf.published.sequence import PublishedSequence

from ..support.sequences import append, new_sequence, rehash
from ..support.tiny import make_model, make_text_data

TASK = "tasks/01-two"
SEED_IS_FIXED = settings(
    max_examples=550, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
PATIENCE = 20  # seconds for one mutation, as a guard against hanging
NASTY = [
    *(
        "",
        "../..",
        "/etc/passwd",
        "a" * 10_000,
        "(a+)+$",
        r"(([a-z]|\.)*)*!",
        "<script>",
        "\n# x",
        "\0",
        "é" * 80,
        "NaN",
    ),
    *(-1, 0, 1, 2**31, 2**63, 10**400, -0.0, 1e308, float("nan"), float("inf"), True, False, None),
    *(
        "<script>",
        "LORA",
        "IA3",
        "SEQ_CLS",
        "CAUSAL_LM",
        "classifier",
        "word_embeddings",
        "query",
        "F32",
        "BF16",
        "I8",
        "F64",
    ),
]
VALUES = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "out"
    sequence = new_sequence(folder)
    append(sequence, "one", 0)
    append(sequence, "two", 1)
    return folder


def places(value, path=()):
    """The paths to all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(draw, value):
    """A JSON value with one to three values replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*places(value)]))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add", "swap"]))
        if action == "replace":
            parent[path[-1]] = draw(VALUES)
        elif action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            key = draw(st.sampled_from(["use_dora", "layers_to_transform", "x"]) | st.text(max_size=8))
            parent[key] = draw(VALUES)
        elif isinstance(parent, dict):
            other = draw(st.sampled_from(sorted(parent)))
            parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
        else:
            parent.append(draw(VALUES))
    return value


@st.composite
def json_files(draw, data: bytes):
    if draw(st.integers(0, 4)):
        return json.dumps(mutated(draw, json.loads(data))).encode()
    return draw(damaged(data))


@st.composite
def damaged(draw, data: bytes):
    """Bytes flipped, cut off, or put in."""
    place = draw(st.integers(0, len(data) - 1))
    action = draw(st.sampled_from(["flip", "cut", "insert"]))
    if action == "cut":
        return data[:place]
    if action == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
    return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]


@st.composite
def tensor_files(draw, data: bytes):
    """With another header."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + size], data[8 + size :]
    changed = draw(json_files(header))
    stated = len(changed) if draw(st.integers(0, 4)) else draw(st.integers(0, 2**64 - 1))
    return struct.pack("<Q", stated) + changed + rest


@contextlib.contextmanager
def within(seconds):
    def give_up(*args):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def expected_logits(folder):
    """By the plainest arithmetic: the base weights plus B A of each task that the index lists."""
    model = make_model("bert")
    for task in Index.read(folder / INDEX).tasks:
        state = load_file(folder / task.folder / "adapter_model.safetensors")
        for key, a in state.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(name).weight.data += state[key.replace("lora_A", "lora_B")].float() @ a.float()
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(**make_text_data("bert", seed=9)[:4]).logits


def files_beside(folder):
    found = (path for path in folder.parent.rglob("*") if path.is_file() and folder not in path.parents)
    return {path: path.read_bytes() for path in found}


def is_refused_or_right(original, folder, name, data) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    (folder / name).write_bytes(data)
    if name != INDEX:
        rehash(folder)
    base = make_model("bert")
    before, beside = {key: x.clone() for key, x in base.state_dict().items()}, files_beside(folder)
    with within(PATIENCE):
        message = refusal(base, folder)
        if message is not None:
            assert len(message) > 25, message
        else:
            found = logits(load_sequence(make_model("bert"), folder))
            torch.testing.assert_close(found, expected_logits(folder), atol=1e-5, rtol=1e-5)
    after = {key.replace(".base_layer", ""): x for key, x in base.state_dict().items() if ".lora_" not in key}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert files_beside(folder) == beside
    return message is not None


def refusal(base, folder) -> str | None:
    """The message with which the sequence is refused; any other exception is a defect."""
    try:
        load_sequence(base, folder)
        PublishedSequence.open(folder).training()
        PublishedSequence.open(folder).bases()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def fuzz(original, folder, name, mutations):
    outcomes = []

    @SEED_IS_FIXED
    @given(mutations((original / name).read_bytes()))
    def run(data):
        outcomes.append(is_refused_or_right(original, folder, name, data))

    run()
    assert len(outcomes) >= 500
    assert any(outcomes)


def test_the_index(original, tmp_path):
    fuzz(original, tmp_path / "out", INDEX, json_files)


def test_adapter_configurations(original, tmp_path):
    fuzz(original, tmp_path / "out", f"{TASK}/adapter_config.json", json_files)


def test_training_records(original, tmp_path):
    fuzz(original, tmp_path / "out", f"{TASK}/training.json", json_files)


def test_headers_of_tensors(original, tmp_path):
    fuzz(original, tmp_path / "out", f"{TASK}/adapter_model.safetensors", tensor_files)


def test_headers_of_bases(original, tmp_path):
    fuzz(original, tmp_path / "out", f"{TASK}/subspace.safetensors", tensor_files)
