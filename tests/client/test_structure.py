"""The structure of the client package: its names, and the output of `help`."""

import importlib
import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

import regd
import regd_client
from regd.protocol.commands import COMMANDS
from regd_client import blocking, models, replies
from tests.support.daemon import ROOT, environment

FOLDER = ROOT / "client/regd_client"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", [f"regd_client.{module}" for module in MODULES])
def test_every_module_lists_its_exports(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__all__ == sorted(
        loaded.__all__, key=lambda name: (not name.isupper(), name.lower() == name, name)
    )
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


def test_no_module_shadows_a_public_name() -> None:
    """Importing a module `regd_client.watch` would replace the function of that name."""
    assert not set(MODULES) & set(regd_client.__all__)
    everything = "".join(f"import regd_client.{module}\n" for module in MODULES)
    code = f"{everything}assert all(callable(getattr(regd_client, name)) for name in regd_client.__all__)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_client_and_daemon_have_the_same_version() -> None:
    assert regd_client.__version__ == regd.__version__


def public_methods(cls: type) -> list[Any]:
    return [
        member for name, member in vars(cls).items() if inspect.isfunction(member) and not name.startswith("_")
    ]


CALLS = [
    *(getattr(regd_client, name) for name in regd_client.__all__ if name.islower()),
    *(getattr(blocking, name) for name in blocking.__all__ if name.islower()),
    *(method for cls in (regd_client.Client, blocking.Client) for method in public_methods(cls) if method.__name__ != "close"),
    regd_client.Registration.update,
    regd_client.Mirror.changed,
    blocking.BlockingRegistration.update,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.__module__}.{call.__qualname__}")
def test_help_shows_arguments_errors_and_an_example(call: Any) -> None:
    text = inspect.getdoc(call) or ""
    assert "\n    " in text.partition("Args:")[0], "no example"
    assert "Raises:" in text
    _, _, arguments = text.partition("Args:\n")
    for name in inspect.signature(call).parameters:
        if name != "self":
            assert f"\n    {name}: " in "\n" + arguments, f"{name} is not described"


def test_reply_to_every_command_is_checked() -> None:
    assert replies._RESULTS.keys() == COMMANDS.keys()


@pytest.mark.parametrize(
    ("kind", "cmd"), [(models.Hello, "hello"), (models.Stats, "stats"), (models.Why, "why"), (models.Instance, "resolve")]
)  # fmt: skip
def test_typed_replies_have_the_members_that_are_checked(kind: Any, cmd: str) -> None:
    shape = replies._RESULTS[cmd]
    assert kind.__required_keys__ == shape.required.keys()
    assert kind.__optional_keys__ == shape.optional.keys()
    assert get_type_hints(kind)
