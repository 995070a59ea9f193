"""What is shipped, what is public, what imports what, and how large anything may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import coord

ROOT = Path(__file__).parent.parent
LAYERS = ("coord", "worker", "api")
"""Each may import those before it, and itself."""
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
OF_COORD = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "coord"]
PLUGIN = ROOT / "pytest_coord.py"
LONGEST_FILE, LONGEST_BODY = 300, 40
SHIPPED = {".py", ".typed", ".html", ".css", ".js", ".svg"}

# An event loop makes itself a pair of sockets, so none can be made unseen.
CONNECTS_NOTHING = """
import sys, threading
FORBIDDEN = {"socket.__new__", "socket.connect", "subprocess.Popen", "os.fork", "a thread"}

def refuse(event, arguments):
    if event in FORBIDDEN:
        raise RuntimeError(event)

sys.addaudithook(refuse)
threading.Thread.start = lambda thread: refuse("a thread", ())
for module in sys.argv[1:]:
    __import__(module)
"""


PRIVATE_NAMES = {
    "fastapi_function_astack": "the one of FastAPI's exit stacks that ends before the response, to commit on",
    "fastapi_inner_astack": "the one that ends after it, to close on",
}
"""Names of other libraries that they do not document, each used in one function; also on docs/architecture.md."""
LOOK_PUBLIC = {"dispatch", "await_only", "await_fallback", "greenlet_spawn", "connection_class"}
ASYNCPG_INSIDES = {"protocol", "connresource", "transaction", "prepared_stmt", "cursor", "connection", "pool"}
CLOSED_BY_THEIR_OWN_BLOCK = ("test_benchmarks.py", "test_embedded.py", "test_testing_plugin.py")
"""Tests that start programs by `with subprocess.Popen(…)`."""
FIELD_NAMES = {"_mapping", "_asdict", "_fields", "_replace", "_exit"}
"""Documented in spite of their underscore."""


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def defined_in(tree: ast.AST) -> set[str]:
    """Names that the code gives itself: whatever it uses of them is its own."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
                found |= {str(each.value) for each in ast.walk(value) if isinstance(each, ast.Constant)}
    return found


def foreign_private_names(tree: ast.AST, own: set[str], here: set[str]) -> set[str]:
    """Private names of other libraries that one file uses: `own` are the package's names, `here` the file's."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls")) if is_private(name) and name not in own:
                found.add(name)
            case ast.Attribute(attr=name, value=value) if is_private(name) and name not in here | FIELD_NAMES:
                found |= set() if isinstance(value, ast.Name) and value.id in ("self", "cls") else {name}
            case ast.Attribute(attr=name):
                found |= {name} & (LOOK_PUBLIC - {"connection_class"})  # redis-py documents that of its pools
            case ast.Constant(value=str(name)) | ast.keyword(arg=str(name)):
                found |= {name} & {"connection_class", *PRIVATE_NAMES}
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] != "coord":
                top, *rest = module.split(".")
                imported_names = [alias.name for alias in names]
                insides = ASYNCPG_INSIDES & {*rest, *imported_names} if top == "asyncpg" else set()
                found |= insides | {
                    each for each in (*rest, *imported_names) if is_private(each) or each in LOOK_PUBLIC
                }
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                found |= {name} if is_private(name) and not name.startswith("__") else set()
    return found


Trees = dict[Path, ast.Module]


@pytest.fixture(scope="module")
def trees() -> Trees:
    return {path: ast.parse(path.read_text()) for path in (*SOURCES, PLUGIN)}


def test_no_private_name_of_another_library_is_used_but_those_that_are_listed(trees: Trees) -> None:
    shipped = [trees[path] for path in (*OF_COORD, PLUGIN)]
    own = set().union(*map(defined_in, shipped))
    found = set().union(*(foreign_private_names(tree, own, defined_in(tree)) for tree in shipped))
    assert found == set(PRIVATE_NAMES)
    assert len(PRIVATE_NAMES) <= 6


@pytest.mark.parametrize(
    "code",
    [
        "session._connections",
        "self._parser",
        "pool.dispatch",
        "from sqlalchemy.util import await_only",
        "from asyncpg.protocol import Protocol",
        "from redis._parsers import X",
        "getattr(engine, '_pool')",
        "connect(connection_class=X)",
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert foreign_private_names(ast.parse(code), set(), set())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path, tree: ast.Module) -> set[str]:
    """The top-level packages that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    built = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    expected = {name_of(path) for path in (ROOT / "coord").rglob("*") if path.suffix in SHIPPED} | {"pytest_coord.py"}
    assert names == expected
    assert "coord/py.typed" in names
    assert metadata.endswith((ROOT / "README.md").read_text())


def test_the_public_names_are_those_that_the_package_imports(trees: Trees) -> None:
    tree = trees[ROOT / "coord" / "__init__.py"]
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    assert coord.__all__ == sorted(name for name in names if not name.startswith("_"))


def test_imports_go_from_the_application_to_the_library(trees: Trees) -> None:
    for path in SOURCES:
        layer = path.relative_to(ROOT).parts[0]
        above = LAYERS[LAYERS.index(layer) + 1 :]
        assert not imported(path, trees[path]) & {*above, "demo", "benchmarks", "tests"}, path


PARTS = [
    *("errors", "durations", "retryable", "cancellation", "database", "timings", "telemetry", "observation", "session"),
    *("locks", "notify", "jobs", "blocking", "fleet", "queue"),
    *("waiting", "coordinator", "worker", "http", "metrics", "console", "dev", "cli", "testing"),
]
"""Of coord, bottom first: each imports only what comes before it, for type checking too."""


def test_packages_import_in_one_order_without_circles(trees: Trees) -> None:
    for path in OF_COORD:
        part = path.relative_to(ROOT / "coord").parts[0].removesuffix(".py")
        for node in ast.walk(trees[path]) if part != "__init__" else ():
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "coord":
                names = [alias.name for alias in node.names] if node.module == "coord" else [node.module.split(".")[1]]
                assert all(PARTS.index(name) <= PARTS.index(part) for name in names), f"{path}, line {node.lineno}"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("coord.console", "jinja2", "console"),
        ("coord.metrics", "prometheus_client", "metrics"),
        ("coord.testing.proof", "httpx", "testing"),
    ],
)
def test_an_import_without_its_extra_names_the_extra(module: str, package: str, extra: str) -> None:
    program = f"import sys; sys.modules['{package}'] = None; import {module}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    hint = rf'ImportError: .* needs? {package}: pip install "coord\[{extra}\]"'
    assert re.fullmatch(hint, ended.stderr.splitlines()[-1])


def test_an_import_connects_nothing_and_starts_nothing() -> None:
    modules = ["coord", "pytest_coord", "coord.testing", "worker.settings", "api"]
    command = [sys.executable, "-c", CONNECTS_NOTHING, *modules]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_file_and_no_function_is_long(trees: Trees) -> None:
    for path in (*SOURCES, PLUGIN):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= LONGEST_BODY, f"{node.name} of {path} has {length} lines"


def test_no_test_starts_a_program_that_is_left_to_the_garbage() -> None:
    """But by `tests/commands.py` or `tests/warm.py`: the warning would be raised in another test."""
    starts = ("create_subprocess_", "subprocess.Popen(")
    found = {path.name for path in ROOT.glob("tests/test_*.py") if any(start in path.read_text() for start in starts)}
    assert found == {"test_package.py", *CLOSED_BY_THEIR_OWN_BLOCK}
