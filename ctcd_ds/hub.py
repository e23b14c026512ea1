"""The Hugging Face hub, asked only where there is a way to it."""

from __future__ import annotations

import os
import socket
import sys
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 5.0  # longer than any hub takes to accept a connection


def settle_hub() -> None:
    """Where the hub does not answer, its libraries look into their cache only: they would try for most of a minute.

    To be called before a name is asked for. A proxy may have a way that this process has not, and is left to them.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    asking = threading.Thread(target=_ask, args=(answered := threading.Event(), constants.ENDPOINT), daemon=True)
    asking.start()
    asking.join(SECONDS)
    if not answered.is_set():
        print(f"{constants.ENDPOINT} does not answer: only its cache here is looked into", file=sys.stderr, flush=True)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
        constants.HF_HUB_OFFLINE = True


def _ask(answered: threading.Event, endpoint: str) -> None:
    """Sets `answered` where there is a connection. In a thread, as no time limit holds for the name's look-up."""
    place = urlsplit(endpoint)
    try:
        socket.create_connection((place.hostname, place.port or (80 if place.scheme == "http" else 443))).close()
    except OSError:
        return
    answered.set()
