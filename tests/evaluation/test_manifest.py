import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_protector.evaluation import manifest

CANARY = "canary-4f1c9a"


def test_versions_hardware_and_memory_are_named() -> None:
    found = manifest.environment()
    assert found["versions"]["python"] == platform.python_version()
    assert all(found["versions"][name] for name in ("torch", "transformers", "peft", "accelerate"))
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_mib"] > 100
    assert isinstance(found["hardware"]["gpus"], list)
    assert 10 < manifest.peak_memory()["process"] < 1_000_000


def test_nothing_of_the_environment_or_the_command_line_is_kept() -> None:
    code = (
        "import json; from mllm_protector.evaluation.manifest import environment, peak_memory;"
        "print(json.dumps([environment(), peak_memory()]))"
    )
    secrets = {"OPENAI_API_KEY": CANARY, "USER": CANARY, "GIT_AUTHOR_NAME": CANARY, "GIT_DIR": f"/{CANARY}"}
    done = subprocess.run(
        [sys.executable, "-c", code, f"--token={CANARY}"],
        env=os.environ | secrets,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "versions" in done.stdout
    assert CANARY not in done.stdout
    assert socket.gethostname() not in json.loads(done.stdout)[0]["hardware"].values()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return package


def git(folder: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        pytest.skip("no git")
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_packages_checkout(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert manifest._commit(checkout) == {"id": head, "dirty": False}
    (checkout / "__init__.py").write_text("changed = True\n")
    assert manifest._commit(checkout) == {"id": head, "dirty": True}


def test_results_beside_the_package_make_no_checkout_dirty(checkout: Path) -> None:
    (checkout.parent / "outputs.json").write_text("{}")
    commit = manifest._commit(checkout)
    assert commit is not None
    assert not commit["dirty"]


def test_a_repository_that_only_lies_around_the_package_is_not_its_commit(checkout: Path) -> None:
    installed = checkout.parent / "site-packages"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    assert manifest._commit(installed) is None


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert manifest._commit(checkout) is None


def test_a_slow_git_is_not_waited_for(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "GIT_SECONDS", 0)
    assert manifest._commit(checkout) is None
