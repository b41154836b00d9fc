"""A model worker in a process of its own, whose detector does what a text says; it loads no weights."""

import os
import signal
import sys
import time
from collections.abc import Sequence

from mllm_protector.errors import InputError
from mllm_protector.guard.protector import Protector
from mllm_protector.protocols import Card
from mllm_protector.serving.settings import GuardSettings
from mllm_protector.serving.worker import main

COMMAND = (sys.executable, "-m", "tests.serving.stub_worker")


class Obedient:
    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        for answer in answers:
            if "kill the worker" in answer:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000 if "hang" in answer else 1 if "slow" in answer else 0)
        return [0.9 if "harmful" in answer else 0.1 for answer in answers]

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        return ["Here is a better idea."] * len(answers)

    @property
    def card(self) -> Card:
        return Card(identity={"kind": "obedient"})


def load(settings: GuardSettings) -> Protector:
    if settings.detector == "missing":
        raise InputError("missing: no such folder")
    return Protector(Obedient(), Obedient(), 0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load))
