"""Helpers of the tests, and what has to be set before the libraries are imported."""

import os
import socket
import tempfile

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    HUB_PORT = probe.getsockname()[1]  # where HubServer runs while a test wants a Hub, and nothing otherwise
# huggingface_hub reads these when it is imported
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-cache-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_TOKEN", None)

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
# so many tiny models gain nothing from threads, and one thread makes float sums the same everywhere
torch.set_num_threads(1)
