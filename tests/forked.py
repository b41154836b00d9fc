"""Scripts in processes forked from this one, which has imported everything already."""

import os
import runpy
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclass(frozen=True)
class Ran:
    """The exit code of a script, and its output; of several processes the highest code and all output."""

    code: int
    out: str
    err: str


def run(name: str, *arguments: str, cwd: Path, processes: int = 1) -> Ran:
    """Run a script, such as ``train_detector``, as from a command line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                if processes > 1:
                    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                    os.environ |= place | {key: str(number) for key, number in numbers.items()}
                os.chdir(cwd)
                for number, file in ((1, out), (2, err)):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                os._exit(_code(name, arguments))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        out.seek(0)
        err.seek(0)
        return Ran(max(codes, key=abs), out.read(), err.read())


def _code(name: str, arguments: tuple[str, ...]) -> int:
    sys.argv = [f"{name}.py", *arguments]
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
