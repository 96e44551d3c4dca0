"""What no linter of ours says: rules of this project, checked over its own source."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from protocols.events import Effect

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocols", "aggregation", "node", "sim")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__init__.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

RUNS_WHAT_IT_READS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def functions_and_classes(
    tree: ast.Module,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node


def is_plain_record(node: ast.AST) -> bool:
    """Only fields, whose names say it all."""
    return isinstance(node, ast.ClassDef) and all(
        isinstance(entry, ast.AnnAssign)
        or (isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant))
        for entry in node.body
    )


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in {*SOURCES, *TESTS}}


def test_there_is_source_to_check() -> None:
    assert len(MODULES) > 30
    assert len(TESTS) > 20


def test_nothing_is_read_that_could_run_code(trees: dict[Path, ast.Module]) -> None:
    found = []
    for path in SOURCES:
        found += [f"{name_of(path)}: {name}" for name in imports(trees[path]) if name in RUNS_WHAT_IT_READS]
        for line, name in calls(trees[path]):
            if name in ("torch.load", "eval", "exec", "yaml.load"):
                found.append(f"{name_of(path)}:{line}: {name}")
    assert found == [], "a peer's bytes would run as code"


def test_numpy_files_are_read_without_their_objects(trees: dict[Path, ast.Module]) -> None:
    for path in SOURCES:
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("allow_pickle", "False") == "False", f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_you_see_is_what_you_import(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_bytes() == b""


def test_every_module_says_what_it_is(trees: dict[Path, ast.Module]) -> None:
    assert [name_of(path) for path in [*MODULES, *TESTS] if not ast.get_docstring(trees[path])] == []


def test_what_is_public_says_what_it_does(trees: dict[Path, ast.Module]) -> None:
    silent = [
        f"{name_of(path)}:{node.lineno}: {node.name}"
        for path in MODULES
        for node in functions_and_classes(trees[path])
        if not ast.get_docstring(node) and not is_plain_record(node)
    ]
    assert silent == []


def test_the_effects_fit_on_one_page() -> None:
    assert len(get_args(Effect)) < 20, "an effect needs its line in the driver and in the world both"


def test_no_test_sleeps(trees: dict[Path, ast.Module]) -> None:
    """Only `tests/integration`, with its real processes, may wait by the clock."""
    asleep = [
        f"{name_of(path)}:{line}"
        for path in TESTS
        if "integration" not in path.parts
        for line, name in calls(trees[path])
        if name == "sleep" or name.endswith(".sleep")
    ]
    assert asleep == []


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = [f"/{name}/".encode() for name in ("work", "Users", "tmp/scratch", "root")]
    found = []
    for name in listed.stdout.decode().split("\0")[:-1]:
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{name}: {place.decode()}" for place in places if place in content]
    assert found == []
