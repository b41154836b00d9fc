"""Processes that work together and are killed together."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress


class Group:
    """Processes forked from this one, which has imported everything."""

    def __init__(self, work: Callable[[], None], processes: int) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        self.running: set[int] = set()
        self.leader = 0
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                os.setpgid(0, self.leader)
                if processes > 1:
                    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                    os.environ |= place | {name: str(number) for name, number in numbers.items()}
                try:
                    work()
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            self.leader = self.leader or child
            with suppress(PermissionError):  # the child was faster
                os.setpgid(child, self.leader)
            self.running.add(child)

    def end_or_kill(self, *, seconds: float, when: Callable[[], bool] = lambda: False) -> bool:
        """Whether it had to be killed, at the latest after ``seconds``; fails if the work itself did."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not when():
            for child in list(self.running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.running.remove(child)
                    assert status == 0, f"the work failed: {status}"
            time.sleep(0.001)
        if self.running:
            os.killpg(self.leader, signal.SIGKILL)
            for child in self.running:
                os.waitpid(child, 0)
        return bool(self.running)
