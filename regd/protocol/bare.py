"""Bare lines: a command and its main arguments without JSON, for people with telnet or nc.

`FORMS` is the table of them. The caller must have ruled out an HTTP request line, since a web page can choose the
method of its request, for example `REGISTER`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regd.core.errors import Code, Refused
from regd.protocol.commands import COMMANDS, Request, check_request, nearest_word


class Quit:
    """The line `quit`: close the connection after all replies were sent."""


Arguments = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a bare line.

    Attributes:
        names: the arguments that it takes, in order.
        required: how many of them it needs.
        arguments: turns the words after the command into arguments.
        usage: the arguments as `help` shows them.
    """

    names: tuple[str, ...] = ()
    required: int = 0
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


def parse_bare_line(line: str) -> Request | Quit:
    """Parse a bare line; the command may be in upper or lower case.

    Raises:
        Refused: `unknown_command`, or `bad_argument` with `field`.
    """
    command, *words = line.split()
    cmd = command.lower()
    form = FORMS.get(cmd)
    if form is None:
        raise _unknown(command)
    if len(words) < form.required:
        missing = form.names[len(words)]
        raise Refused(Code.BAD_ARGUMENT, f"{cmd} needs {missing}: {cmd} {form.usage}", field=missing)
    if len(words) > len(form.names):
        extra = words[len(form.names)][:64]
        hint = f"write {cmd} {form.usage}" if form.names else f"{cmd} takes none"
        raise Refused(Code.BAD_ARGUMENT, f"{cmd} has no argument {extra!r}; {hint}", field=extra)
    if cmd == "quit":
        return Quit()
    arguments = form.arguments(words)
    # `short` is not an argument of the JSON command: it asks for the help text for people.
    return Request(cmd, None, arguments) if "short" in arguments else check_request(cmd, None, arguments)


def _unknown(word: str) -> Refused:
    cmd = word.lower()
    if cmd in COMMANDS:
        near = [cmd]
        hint = f'it needs a JSON line: {{"cmd":"{cmd}"}}'
    else:
        near = nearest_word(cmd, FORMS)
        hint = f"did you mean {near[0]!r}?" if near else "help lists them"
    return Refused(Code.UNKNOWN_COMMAND, f"no command {word[:64]!r}; {hint}", near=near)
