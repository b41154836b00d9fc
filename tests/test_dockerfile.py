"""The Dockerfile names what exists; no image is built."""

import json
import re
import shlex
from pathlib import Path

import yaml

from mllm_protector.serving.proxy import SERVED

ROOT = Path(__file__).parents[1]
LINES = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
CONFIG = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())


def said(instruction: str) -> list[str]:
    return [words for name, words in LINES if name == instruction]


def test_all_that_is_copied_exists_and_gets_into_the_build() -> None:
    ignored, *let_in = (ROOT / ".dockerignore").read_text().split()
    assert ignored == "*"
    copied = [source for words in said("COPY") for source in shlex.split(words)[:-1]]
    assert {f"!{source}" for source in copied} == {line for line in let_in if line.startswith("!")}
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_package_is_installed_from_what_is_copied() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("README.md", "LICENSE"):
        assert name in project
        assert name in " ".join(said("COPY")), name
    [oldest] = re.findall(r'requires-python = ">=([\d.]+)"', project)
    assert said("FROM") == [f"python:{oldest}-slim"]  # which is what constraints.txt was tested with


def test_it_runs_the_script_with_keys_of_its_config_and_not_as_root() -> None:
    [words] = said("ENTRYPOINT")
    python, script, *overrides = json.loads(words)
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    for override in overrides:
        value = CONFIG
        for key in override.partition("=")[0].split("."):
            assert key in value, override
            value = value[key]
    names = [name for name, _ in LINES]
    assert said("USER")[-1] not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_its_health_is_asked_at_a_route_that_is_served() -> None:
    [words] = said("HEALTHCHECK")
    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", words)
    assert int(port) == CONFIG["port"] == int(said("EXPOSE")[0])
    assert f"GET {path}" in SERVED
