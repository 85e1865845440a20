"""The floors: imports go down only, and each floor keeps off what it must not know."""

import ast
import sys
from pathlib import Path

import pytest

from tests.support.daemon import ROOT

PURE = {"asyncio", "time", "socket", "logging", "random", "threading", "os"}
# Folder: what of regd it may import, and what it must never import.
FLOORS: dict[str, tuple[set[str], set[str]]] = {
    "regd/core": ({"regd.core"}, PURE | {"json"}),
    "regd/protocol": ({"regd.core", "regd.protocol"}, PURE),
    "regd/storage": ({"regd.core", "regd.storage"}, PURE - {"os"}),
    "regd/server": ({"regd", "regd.core", "regd.protocol", "regd.storage", "regd.server"}, set()),
    "regd/cli": ({"regd", "regd.cli", "regd.server", "regd.storage", "regd_client"}, set()),
    "regd/testing": ({"regd.core", "regd.server", "regd.storage", "regd.testing", "regd_client"}, set()),
    "regd/cli/top": ({"regd.cli", "regd_client"}, set()),
    "client/regd_client": ({"regd_client"}, set()),
    "services": ({"regd_client"}, set()),
}
# What is not in the standard library, and who may import it: an extra, or the framework of an example.
OTHERS = {
    "regd/cli/regd.py": ("uvloop",),
    "regd/cli/top/screen.py": ("prompt_toolkit",),
    "regd/testing/plugin.py": ("pytest",),
    "services/gateway.py": ("starlette",),
}
FILES = [(folder, path) for folder in FLOORS for path in sorted((ROOT / folder).glob("*.py"))]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "regd" else str(node.module)
                for alias in node.names
            }
    return found


@pytest.mark.parametrize(("folder", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_imports_go_down_only(folder: str, path: Path) -> None:
    may, never = FLOORS[folder]
    for name in imported(path):
        top = name.partition(".")[0]
        assert top not in never, f"{path.name} imports {name}"
        if top in ("regd", "regd_client"):
            floor = top if top == "regd_client" else ".".join(name.split(".")[:2])
            assert floor in may, f"{path.name} imports {name}"
        else:
            allowed = top in sys.stdlib_module_names or top in OTHERS.get(path.relative_to(ROOT).as_posix(), ())
            assert allowed, f"{name} is not in the standard library"


@pytest.mark.parametrize(
    "path",
    [path for _, path in FILES if path.name != "__main__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module head"
