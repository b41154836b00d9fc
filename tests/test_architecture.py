"""The package is read as syntax trees; nothing of it is imported. Docstrings and prints are ruff's."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "mllm_protector"
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / PACKAGE).rglob("*.py"))
}
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))

FLOORS = (
    ("data",),
    ("models",),
    ("guard",),
    ("training", "judges", "benchmarks"),
    ("evaluation",),
    ("reporting",),
    ("generation",),
    ("serving",),
    ("integrations",),
)
"""From the lowest up; below them are the modules of the package itself, above them its ``__init__``."""
APART = ("training", "evaluation")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Full names of everything that a module imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imports(path):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES and module != PACKAGE:
            found.add(module)
    return found


def room(module: str) -> str:
    """The name of the folder that a module is in; empty for a module of the package itself."""
    names = module.split(".")
    return names[1] if len(names) > 2 or (REPOSITORY / PACKAGE / names[-1]).is_dir() else ""


def floor(module: str) -> int:
    if module == PACKAGE:
        return len(FLOORS)
    return next((place for place, rooms in enumerate(FLOORS) if room(module) in rooms), -1)


def test_no_module_imports_from_a_higher_floor() -> None:
    for module, path in MODULES.items():
        assert module == PACKAGE or floor(module) >= 0 or not room(module), f"{module} has no floor"
        for imported in own_imports(path):
            assert floor(imported) <= floor(module), f"{module} imports {imported}"


def test_training_and_evaluation_never_meet() -> None:
    for module, path in MODULES.items():
        if room(module) in APART:
            [other] = set(APART) - {room(module)}
            met = [name for name in own_imports(path) if room(name) == other]
            assert not met, f"{module} imports {met}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_only_two_modules_know_hydra() -> None:
    for module, path in MODULES.items():
        libraries = {name.partition(".")[0] for name in imports(path)}
        allowed = module in (f"{PACKAGE}.config", f"{PACKAGE}.command_line")
        assert allowed or not libraries & {"hydra", "omegaconf"}, module


def test_a_script_is_a_command_of_the_table() -> None:
    for path in SCRIPTS:
        expected = "config.launch" if path.stem == "benchmark" else "commands.run_script"
        assert imports(path) == {f"{PACKAGE}.{expected}"}, path
