import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from tests.generation.scripted import is_for_rejected, scenario_file, well
from tests.servers import Reply, Request, ScriptedServer

REPOSITORY = Path(__file__).parents[2]
CANARY = "sk-canary-0123456789"


def started(server: ScriptedServer, folder: Path, *given: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "generate_pairs.py"),
        "generator.model=m",
        f"generator.base_url={server.base_url}",
        "generator.api_key_env=SECRET_OF_TEST",
        "judge=[chat]",
        "judges.chat.chat.model=m",
        f"judges.chat.chat.base_url={server.base_url}",
        "judges.chat.chat.api_key_env=SECRET_OF_TEST",
        "generator.concurrency=4",
        f"scenario_file={scenario_file(folder)}",
        "output_dir=new",
        *given,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"SECRET_OF_TEST": CANARY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pairs_in(folder: Path) -> list[str]:
    return [json.loads(line)["query"] for line in (folder / "new" / "pairs.jsonl").open()]


def test_a_stopped_run_writes_what_is_complete_and_the_next_ones_ask_only_for_the_rest(
    tmp_path: Path,
) -> None:
    """SIGKILL, then SIGTERM, then to the end; no secret is written or said."""
    half = threading.Event()

    def slowly(request: Request) -> Reply:
        if len([one for one in server.requests if is_for_rejected(one)]) >= enough:
            half.set()
        return well(request, seconds=0.05)

    with ScriptedServer(slowly) as server:
        for sign, enough in ((signal.SIGKILL, 6), (signal.SIGTERM, 12)):
            half.clear()
            process = started(server, tmp_path, "pairs=12")
            assert half.wait(300), f"{enough} were never asked"
            process.send_signal(sign)
            said, _ = process.communicate(timeout=300)
            assert process.returncode == (-9 if sign == signal.SIGKILL else 128 + sign), said
        process = started(server, tmp_path, "pairs=12")
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        bodies = Counter(json.dumps(request.body) for request in server.requests)
        assert server.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    assert sum(count - 1 for count in bodies.values()) <= 2 * 4  # those under way when it was stopped
    assert len(set(pairs_in(tmp_path))) == len(pairs_in(tmp_path)) == 24
    assert "24 of 24 wanted pairs were made" in said
    assert CANARY not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
