"""What is built from the repository, and that it works without the repository."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from mllm_protector.commands import COMMANDS
from tests.test_scripts import EVALUATION, TRAINING

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SPIES = f"""\
import os, sys

def opened(event, arguments, inside={str(REPOSITORY)!r}, own={sys.prefix!r}):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(inside + os.sep) and not path.startswith(own + os.sep):
            print("READ:", path, file=sys.stderr)

sys.addaudithook(opened)
"""
"""Says of every file of the repository that it is read; the interpreter of the tests may lie in there too."""
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def tracked() -> list[str]:
    files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    said = subprocess.run(files, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [name for name in said.split("\0") if (REPOSITORY / name).is_file()]


def test_every_folder_of_the_package_is_listed() -> None:
    folders = {path.parent for path in (REPOSITORY / "mllm_protector").rglob("*.py")}
    names = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == {*names, "mllm_protector.configs"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of a copy of the repository, and the wheel that comes from it."""
    copy, out, unpacked = (tmp_path_factory.mktemp(name) for name in ("copy", "out", "unpacked"))
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name)
    for hook, place in (("build_sdist", copy), ("build_wheel", unpacked)):
        command = [sys.executable, "-c", BUILD, hook, str(out)]
        ran = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        if place is copy:
            [source] = out.glob("*.tar.gz")
            with tarfile.open(source) as archive:
                archive.extractall(unpacked, filter="data")
            [inside] = unpacked.iterdir()
            for path in list(inside.iterdir()):
                path.rename(unpacked / path.name)
    shutil.rmtree(copy)
    shutil.rmtree(unpacked)
    return out


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configs_and_the_licence_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    inside = {name for name in files if ".dist-info/" not in name}
    folders = ("mllm_protector/", "configs/")
    expected = {
        re.sub("^configs/", "mllm_protector/configs/", each) for each in tracked() if each.startswith(folders)
    }
    speed = {each for each in expected if re.match("mllm_protector/configs/(benchmark.yaml|model/)", each)}
    assert inside == expected - speed
    assert [name for name in files if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(built: Path) -> None:
    [source] = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if not name.startswith(".")} <= inside


@pytest.mark.slow
def test_an_installed_wheel_trains_and_measures_far_from_the_repository(built: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    [packages] = home.glob("lib/python*/site-packages")
    # The dependencies are those of the tests. Paths in a .pth file run no .pth files of theirs.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    (packages / "sitecustomize.py").write_text(SPIES)
    [wheel] = built.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, capture_output=True, check=True)

    def run(*arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(home / "bin" / "mllm-protector"), *arguments]
        ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "READ:" not in ran.stderr, ran.stderr
        return ran.stdout

    assert run("--version") == f"mllm-protector {PROJECT['project']['version']}\n"
    assert all(f"  {name} " in run("--help") for name in COMMANDS)
    assert "\nfit=tiny " in run("train-detector", "--help")
    for part in ("detector", "detoxifier"):
        assert f"written: outputs/{part} " in run(f"train-{part}", *TRAINING)
    run("eval", *EVALUATION)
    assert "<html" in (work / "outputs" / "mmsafety" / "report.html").read_text()
    assert run("prepare-data")
    assert (
        "READ:"
        in subprocess.run(  # the spy is awake
            [str(python), "-c", f"open({str(REPOSITORY / 'README.md')!r})"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    )
