"""Imports go down only, without circles, and each layer keeps to its allowed modules."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from regd.core.model import Entry
from tests.support.daemon import ROOT

PURE = {"asyncio", "time", "socket", "logging", "random", "threading", "os"}
# Folder: what of regd it may import, and what of the standard library it must never import.
FLOORS: dict[str, tuple[set[str], set[str]]] = {
    "regd/core": ({"regd.core"}, PURE | {"json"}),
    "regd/protocol": ({"regd.core", "regd.protocol"}, PURE),
    "regd/storage": ({"regd.core", "regd.storage"}, PURE - {"os", "threading"}),
    "regd/system": ({"regd.core", "regd.storage", "regd.system"}, set()),
    "regd/server": (
        {"regd", "regd.core", "regd.protocol", "regd.storage", "regd.system", "regd.server"},
        set(),
    ),
    "regd/cli": (
        {
            "regd",
            "regd.bridge",
            "regd.cli",
            "regd.core",
            "regd.gateways",
            "regd.server",
            "regd.storage",
            "regd.system",
            "regd_client",
        },
        set(),
    ),
    "regd/bridge/etcd": ({"regd.bridge"}, set()),
    "regd/bridge/etcd/stubs": ({"regd.bridge"}, set()),
    "regd/bridge": (
        {"regd", "regd.bridge", "regd.core", "regd.gateways", "regd.protocol", "regd.system", "regd_client"},
        set(),
    ),
    "regd/gateways": ({"regd.gateways", "regd.system", "regd_client"}, set()),
    "regd/testing": (
        {"regd.core", "regd.server", "regd.system", "regd.storage", "regd.testing", "regd_client"},
        set(),
    ),
    "regd/cli/top": ({"regd.cli", "regd_client"}, set()),
    "client/regd_client": ({"regd_client"}, set()),
    "services": ({"regd_client"}, set()),
}
# Third-party modules, and the files that may import them: an extra, or the framework of an example. `processes` is
# beside the examples that import it.
THIRD_PARTY = {
    "regd/bridge/metrics.py": ("prometheus_client",),
    "regd/bridge/etcd/calls.py": ("google",),
    "regd/bridge/etcd/member.py": ("google", "grpc"),
    "regd/bridge/etcd/methods.py": ("google",),
    "regd/bridge/etcd/stubs/kv_pb2.py": ("google",),
    "regd/bridge/etcd/stubs/rpc_pb2.py": ("google",),
    "regd/cli/regd.py": ("uvloop",),
    "regd/cli/top/screen.py": ("prompt_toolkit",),
    "regd/gateways/dns_messages.py": ("dns",),
    "regd/gateways/guard.py": ("starlette",),
    "regd/gateways/http_server.py": ("h11", "uvicorn"),
    "regd/gateways/metrics.py": ("prometheus_client",),
    "regd/gateways/page_files.py": ("starlette",),
    "regd/gateways/routes.py": ("starlette",),
    "regd/testing/plugin.py": ("pytest",),
    "services/cluster.py": ("processes",),
    "services/demo.py": ("processes",),
    "services/gateway.py": ("starlette",),
}
CLIENT_DEPTH_MAX = 8  # the longest chain of imports in the client, its `__init__` aside

FILES = [(folder, path) for folder in FLOORS for path in sorted((ROOT / folder).glob("*.py"))]
ROOTS = {"regd": ROOT / "regd", "regd_client": ROOT / "client/regd_client"}


def name_of(path: Path) -> str:
    """Return the dotted name of a module of `regd` or `regd_client`."""
    base = ROOT / "client" if path.is_relative_to(ROOT / "client") else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for root in ROOTS.values() for path in sorted(root.rglob("*.py"))}


@cache
def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                names.add(member if member in MODULES or node.module == "regd" else str(node.module))
    return names


def circles(modules: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, directly or not. `modules`: what each one imports."""
    reached = {name: reachable(name, modules) for name in modules}
    found: list[set[str]] = []
    for name in modules:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def reachable(name: str, modules: dict[str, set[str]]) -> set[str]:
    """Return the modules that importing `name` imports; `name` itself is one of them only if it is in a circle."""
    seen: set[str] = set()
    waiting = list(modules[name])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += modules[module]
    return seen


def depth(modules: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports, where a circle counts as one module."""
    circle_of = {name: min(circle) for circle in circles(modules) for name in circle}

    @cache
    def below(name: str) -> int:
        members = [other for other in modules if circle_of.get(other, other) == name]
        targets = {circle_of.get(target, target) for member in members for target in modules[member]}
        return 1 + max((below(target) for target in targets - {name}), default=0)

    return max(below(circle_of.get(name, name)) for name in modules)


def graph(root: str) -> dict[str, set[str]]:
    """Return what each module of a package imports of this project."""
    names = [name for name in MODULES if name.split(".")[0] == root]
    return {name: imported(MODULES[name]) & set(names) for name in names}


def test_imports_go_down_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, path in FILES
        for name in imported(path)
        if not may_import(folder, path, name)
    ]
    assert wrong == []


def may_import(folder: str, path: Path, name: str) -> bool:
    """Return whether a module may import another: of a lower floor, the standard library, or its own extra."""
    may, never = FLOORS[folder]
    top = name.partition(".")[0]
    if top in never:
        return False
    if top in ROOTS:
        return (top if top == "regd_client" else ".".join(name.split(".")[:2])) in may
    own = THIRD_PARTY.get(path.relative_to(ROOT).as_posix(), ())
    return top in sys.stdlib_module_names or top in own


def test_every_folder_has_a_floor() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert folders - set(FLOORS) == {"regd"}


@pytest.mark.parametrize("root", ROOTS)
def test_no_two_modules_import_each_other(root: str) -> None:
    assert circles(graph(root)) == []


def test_import_circle_is_detected() -> None:
    modules = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(modules) == [{"b", "c"}]
    assert depth(modules) == 3


def test_client_has_few_import_floors() -> None:
    client = graph("regd_client")
    del client["regd_client"]  # it re-exports the others
    assert depth({name: names - {"regd_client"} for name, names in client.items()}) <= CLIENT_DEPTH_MAX


def test_no_private_module_of_cpython() -> None:
    private = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imported(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert private == []


def test_nobody_pretends_to_a_type_checker() -> None:
    assert not [module for module, path in MODULES.items() if "TYPE_CHECKING = False" in path.read_text()]


def test_nothing_alters_an_entry() -> None:
    modules = [name for name in MODULES if name.startswith("regd.") and ".cli" not in name]
    assert [line for name in modules for line in altered_entries(name)] == []


def altered_entries(name: str) -> Iterator[str]:
    """Yield the assignments in a module to what may be a field of another object's `Entry`."""
    fixed = {field.name for field in fields(Entry)}
    if name == "regd.protocol.messages":
        fixed.remove("encoded")  # a cache
    if name == "regd.storage.recovery":
        fixed.remove("rev")  # of the registry
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
            continue
        if node.attr in fixed and ast.unparse(node.value) != "self":
            yield f"{name}, line {node.lineno}: {ast.unparse(node)} is set"


def test_every_module_has_a_docstring() -> None:
    paths = [path for _, path in FILES if path.name != "__main__.py"]
    assert not [path for path in paths if not ast.get_docstring(ast.parse(path.read_text()))]
