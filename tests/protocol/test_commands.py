"""The table of commands: suggestions, `help`, and the arguments of each command."""

import pytest

from regd.core.errors import Code, Refused
from regd.protocol.commands import COMMANDS, check_request, describe_commands


@pytest.mark.parametrize(
    ("cmd", "given", "code", "field", "hint"),
    [
        ("regster", {}, Code.UNKNOWN_COMMAND, None, "'register'"),
        ("", {}, Code.UNKNOWN_COMMAND, None, "help"),
        ("x" * 60_000, {}, Code.UNKNOWN_COMMAND, None, "help"),
        ("register", {"name": "a", "prot": 1}, Code.BAD_ARGUMENT, "prot", "'port'"),
        ("register", {"name": "a"}, Code.BAD_ARGUMENT, "port", "needs port"),
        ("ping", {"x" * 60_000: 1}, Code.BAD_ARGUMENT, "x" * 64, "it takes none"),
        ("resolve", {"name": "A"}, Code.BAD_ARGUMENT, "name", "labels"),
        ("resolve", {"name": "a", "all": 1}, Code.BAD_ARGUMENT, "all", "true or false"),
        ("list", {"meta": {"x" * 60_000: 1}}, Code.BAD_ARGUMENT, "meta", "not a string"),
        ("list", {"limit": 1_001}, Code.BAD_ARGUMENT, "limit", "1 to 1000"),
        ("list", {"limit": 0}, Code.BAD_ARGUMENT, "limit", "1 to 1000"),
        ("list", {"after": "A/"}, Code.BAD_ARGUMENT, "after", "labels"),
        ("register", {"name": "a", "port": 1, "if": -1}, Code.BAD_ARGUMENT, "if", "0 to"),
        ("register", {"name": "a", "port": 1, "if": 2**63}, Code.BAD_ARGUMENT, "if", "0 to"),
        ("help", {"topic": "regster"}, Code.BAD_ARGUMENT, "topic", "'register'"),
        ("help", {"topic": 3}, Code.BAD_ARGUMENT, "topic", "one of"),
    ],
)
def test_refusals_say_what_to_do(
    cmd: str, given: dict[str, object], code: Code, field: str | None, hint: str
) -> None:
    with pytest.raises(Refused) as refusal:
        check_request(cmd, None, given)
    assert refusal.value.code is code
    assert refusal.value.details.get("field") == field
    assert hint in refusal.value.message
    assert len(refusal.value.message) < 400


def test_help_lists_every_command_and_argument() -> None:
    assert describe_commands().keys() == COMMANDS.keys()
    assert list(describe_commands("resolve")) == ["resolve"]
    for name, command in COMMANDS.items():
        shown = describe_commands()[name]
        assert isinstance(shown, dict)
        assert shown["args"].keys() == command.arguments.keys()
        assert "\n" not in shown["doc"]
