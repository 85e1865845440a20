"""Bare lines, for people with telnet or nc: a command and its main arguments, without JSON.

`FORMS` is the table of bare lines. `parser.py` recognizes HTTP request lines first, since a web page may choose
any method for its request, such as `REGISTER`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regd.core.errors import Code, Refused
from regd.protocol.commands import COMMANDS, Request, check, nearest_word


class Quit:
    """The line `quit`: send the replies that are due, then close."""


Arguments = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a bare line. `takes` has the names of its arguments; the first `needs` of them are required."""

    takes: tuple[str, ...] = ()
    needs: int = 0
    arguments: Callable[[Sequence[str]], Arguments] = lambda words: {"name": words[0]} if words else {}
    usage: str = ""


_ADDRESS = re.compile(r"(?:(?P<host>[^:\[\]]+|\[[^\[\]]+\]):)?(?P<port>[0-9]{1,5})")


def _registration(words: Sequence[str]) -> Arguments:
    name, address = words
    match = _ADDRESS.fullmatch(address)
    if match is None:
        message = f"port must be PORT or HOST:PORT, an IPv6 address in brackets, not {address[:64]!r}"
        raise Refused(Code.BAD_ARGUMENT, message, field="port")
    host = match["host"]
    arguments: dict[str, object] = {"name": name, "port": int(match["port"])}
    return arguments if host is None else arguments | {"host": host.strip("[]")}


_NAME = Form(("name",), 1, usage="NAME")
_PATTERN = Form(("name",), 0, usage="[NAME|PREFIX*]")

FORMS: Mapping[str, Form] = {
    "help": Form(arguments=lambda words: {"short": True}),
    "ping": Form(),
    "list": _PATTERN,
    "resolve": _NAME,
    "register": Form(("name", "port"), 2, _registration, "NAME [HOST:]PORT"),
    "deregister": _NAME,
    "why": _NAME,
    "history": Form(("name",), 0, usage="[NAME]"),
    "stats": Form(),
    "watch": _PATTERN,
    "quit": Form(),
}

USAGES = [f"{word} {form.usage}".rstrip() for word, form in FORMS.items()]


def understand(line: str) -> Request | Quit:
    """Parse a bare line; the command may be in upper or lower case.

    Raises:
        Refused: `unknown_command`, or `bad_argument` with `field`.
    """
    word, *given = line.split()
    cmd = word.lower()
    form = FORMS.get(cmd)
    if form is None:
        raise _unknown(word)
    if len(given) < form.needs:
        missing = form.takes[len(given)]
        raise Refused(Code.BAD_ARGUMENT, f"{cmd} needs {missing}: {cmd} {form.usage}", field=missing)
    if len(given) > len(form.takes):
        extra = given[len(form.takes)][:64]
        takes = f"write {cmd} {form.usage}" if form.takes else f"{cmd} takes none"
        raise Refused(Code.BAD_ARGUMENT, f"{cmd} has no argument {extra!r}; {takes}", field=extra)
    if cmd == "quit":
        return Quit()
    arguments = form.arguments(given)
    return Request(cmd, None, arguments) if "short" in arguments else check(cmd, None, arguments)


def _unknown(word: str) -> Refused:
    cmd = word.lower()
    if cmd in COMMANDS:
        near = [cmd]
        hint = f'it needs a JSON line: {{"cmd":"{cmd}"}}'
    else:
        near = nearest_word(cmd, FORMS)
        hint = f"did you mean {near[0]!r}?" if near else "help lists them"
    return Refused(Code.UNKNOWN_COMMAND, f"no command {word[:64]!r}; {hint}", near=near)
