"""What holds for every test: no network, and no state that one training leaves to the next."""

import atexit
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, and for child processes
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLLM_PROTECTOR_CACHE"] = tempfile.mkdtemp(prefix="mllm_protector_cache_")
# Several threads make models this small slower, most of all on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.models.fixtures import bases, make_detector, make_detoxifier, tuning

__all__ = ["bases", "make_detector", "make_detoxifier", "tuning"]

atexit.register(shutil.rmtree, os.environ["MLLM_PROTECTOR_CACHE"], ignore_errors=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

# By itself hypothesis fails an example that takes 0.2 s, which a busy machine needs for any.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

CONNECT = socket.socket.connect


def connect_locally(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and not is_local(str(address[0])):
        raise AssertionError(f"a test wanted to connect to {address}")
    CONNECT(self, address)


def is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that two workers end at about the same time."""
    slow = ("test_scripts", "training", "test_long_answers", "test_frozen", "test_served_run")
    items.sort(key=lambda item: not any(name in item.nodeid for name in slow))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(autouse=True)
def no_closed_log_handlers() -> None:
    """A script that an earlier test ran in this process logged to the output that was captured then."""
    for handler in logging.root.handlers[:]:
        if getattr(getattr(handler, "stream", None), "closed", False):
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
