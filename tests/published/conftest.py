"""The Hub of these tests."""

import pytest
import tenacity

from eblora_hf.published import requests

from ..support import HUB_PORT
from ..support.hub_server import TOKEN, HubServer


@pytest.fixture
def server(monkeypatch):
    """A local Hub, a token for it, and no waiting between tries."""
    with HubServer(HUB_PORT) as running:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(requests._retry, "wait", tenacity.wait_none())
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield running
