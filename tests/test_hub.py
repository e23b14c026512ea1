"""The hub is asked only where there is a way to it; else its libraries look into their cache, and say so at once."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from commands import busy
from ctcd_ds import cli, hub
from ctcd_ds.corpus.tokenizer import bring_tokenizer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port of this machine that is the hub, for a process that may ask it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def test_a_hub_that_answers_is_asked(server: socket.socket, capsys: Any) -> None:
    hub.settle_hub()
    assert not constants.HF_HUB_OFFLINE and not capsys.readouterr().err


def test_a_hub_that_does_not_answer_costs_seconds(
    server: socket.socket, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, or a look-up that hangs: a name that is nothing here fails soon, with the way to read what is said."""
    monkeypatch.chdir(tmp_path)
    server.close()
    begun = time.monotonic()
    with pytest.raises(cli.UserError, match=r"tokenizer owner/name cannot be loaded"):
        bring_tokenizer("owner/name")
    assert time.monotonic() - begun < hub.SECONDS + busy(5)
    assert "does not answer: only its cache here is looked into" in capsys.readouterr().err

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    hang = threading.Event()

    def hanging(_: object) -> None:
        hang.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hanging)
    hub.settle_hub()
    hang.set()
    assert constants.HF_HUB_OFFLINE


def test_a_proxy_is_left_to_the_libraries(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    server.close()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    hub.settle_hub()
    assert not constants.HF_HUB_OFFLINE
