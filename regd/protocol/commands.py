"""`COMMANDS`, the table of commands.

Requests are checked against it, suggestions and `help` come from it, and a test compares it with PROTOCOL.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from regd.core import model
from regd.core.errors import Code, Invalid, Refused
from regd.core.limits import DEFAULT
from regd.core.model import Key

# Memory, measured on CPython 3.11. A character of a text takes up to 4 bytes.
_REQUEST_BYTES = 1_024  # a waiting request
_PAIR_BYTES = 192  # a key and a value in a dictionary, without their text


@dataclass(frozen=True, slots=True)
class ArgType:
    """The type of an argument: its name in `help`, and a check that returns a valid value or raises `Invalid`."""

    word: str
    check: Callable[[object], Any]


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a command. `doc` is its line in `help`."""

    kind: ArgType
    doc: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        doc: what it does, for `help`.
        result: the fields of its reply, for `help`.
        arguments: its arguments by name.
        waits_for_commit: it is answered once its changes are committed.
        needs_write_access: only users who may write may use it. `renew` alone needs it and waits for no commit:
            the deadline of a lease is not on disk.
        checks: the check of each argument. This and `required` are computed once, from `arguments`, to save time
            for each request.
        required: the names of the required arguments.
    """

    doc: str
    result: str
    arguments: Mapping[str, Argument]
    waits_for_commit: bool = False
    needs_write_access: bool = False
    checks: Mapping[str, Callable[[object], Any]] = field(init=False)
    required: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        checks = {name: argument.kind.check for name, argument in self.arguments.items()}
        object.__setattr__(self, "checks", checks)
        required = tuple(name for name, argument in self.arguments.items() if argument.required)
        object.__setattr__(self, "required", required)


class Request(NamedTuple):
    """A valid request: a command of the table, and arguments that passed its checks."""

    cmd: str
    id: str | int | None
    arguments: Mapping[str, Any]

    @property
    def weight_bytes(self) -> int:
        """The memory of the waiting request, by estimate."""
        size = _REQUEST_BYTES
        for value in self.arguments.values():
            if type(value) is dict:
                size += _PAIR_BYTES * len(value) + 4 * len("".join([*value, *value.values()]))
            elif type(value) is str:
                size += 4 * len(value)
        return size


def _check_key(value: object) -> Key:
    """Check a position in a list, from `next` of a reply: NAME or NAME/INSTANCE."""
    if type(value) is not str:
        raise Invalid("must be a string, as `next` gave it")
    name, _, instance = value.partition("/")
    return (model.check_name(name), model.check_instance(instance))


def _check_topic(value: object) -> str:
    if type(value) is not str or value not in COMMANDS:
        near = nearest_word(value, COMMANDS) if type(value) is str else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Invalid(f"must be a command, one of {', '.join(COMMANDS)}{hint}")
    return value


def _check_epoch(value: object) -> str:
    if type(value) is not str or not 1 <= len(value) <= 64:
        raise Invalid("must be a string, as `watch` or `hello` gave it")
    return value


_AGE_S_MAX = 3_153_600_000.0  # a hundred years
_REVISION_MAX = 2**63 - 1  # programs in other languages may read it into 64 bits

NAME = ArgType("name", model.check_name)
PATTERN = ArgType("name or prefix*", model.check_pattern)
INSTANCE = ArgType("instance", model.check_instance)
PORT = ArgType("port 1-65535", model.check_port)
PRIORITY = ArgType("0-65535", model.check_priority)
HOST = ArgType("IP address or host name", model.check_host)
META = ArgType("object of strings", model.check_meta)
STATE = ArgType("starting, ready or draining", model.check_state)
FLAG = ArgType("true or false", model.check_flag)
REVISION = ArgType("revision", lambda value: model.check_whole(value, 0, _REVISION_MAX))
LIMIT = ArgType(
    f"1-{DEFAULT.reply_instances_max}", lambda value: model.check_whole(value, 1, DEFAULT.reply_instances_max)
)
PLACE = ArgType("a reply's `next`", _check_key)
TOPIC = ArgType("command", _check_topic)
PID = ArgType("process number", lambda value: model.check_whole(value, 1, 2**31 - 1))
TTL = ArgType(
    f"seconds {DEFAULT.ttl_s_min:g}-{DEFAULT.ttl_s_max:g}",
    lambda value: model.check_seconds(value, DEFAULT.ttl_s_min, DEFAULT.ttl_s_max),
)
WAIT = ArgType(
    f"seconds 0-{DEFAULT.wait_s_max:g}", lambda value: model.check_seconds(value, 0, DEFAULT.wait_s_max)
)
AGE = ArgType("seconds", lambda value: model.check_seconds(value, 0, _AGE_S_MAX))
EPOCH = ArgType("epoch", _check_epoch)
NUMBER = ArgType("number of a watch", lambda value: model.check_whole(value, 1, _REVISION_MAX))

_IF = Argument(REVISION, "act only if the registration is at this revision; 0: only if there is none")
_OF_NAME = Argument(NAME, "the service", required=True)
_ONE = Argument(INSTANCE, 'which instance; "" when left out')

COMMANDS: Mapping[str, Command] = {
    "ping": Command("Reply, and do nothing.", "nothing else", {}),
    "hello": Command(
        "Describe the daemon.",
        "`server` `version` `protocol` `epoch` `rev` `features` `limits` `host` `loop`",
        {},
    ),
    "help": Command(
        "Describe the commands, or one.",
        "`commands`, by name: `doc` `result` `args`",
        {"topic": Argument(TOPIC, "only this command")},
    ),
    "register": Command(
        "Register a service, or replace a registration. What is left out takes its default.",
        "`name` `instance` `host` `port` `rev`, and `replaced` if it was at another address",
        {
            "name": _OF_NAME,
            "port": Argument(PORT, "where it listens", required=True),
            "host": Argument(HOST, f"the address it listens on; {model.DEFAULT_HOST} when left out"),
            "instance": _ONE,
            "meta": Argument(META, "labels; none when left out"),
            "state": Argument(STATE, "only `ready` is resolved, and the default"),
            "priority": Argument(PRIORITY, "lower is preferred; 0 when left out"),
            "hold": Argument(FLAG, "end it with this connection"),
            "pid": Argument(PID, "end it with this process"),
            "ttl": Argument(TTL, "end it when it is not renewed for so long"),
            "if": _IF,
            "force": Argument(FLAG, "take the name from a living owner"),
        },
        waits_for_commit=True,
        needs_write_access=True,
    ),
    "deregister": Command(
        "End a registration; one of several holders ends only its own hold.",
        "`removed` (how many) `rev`",
        {"name": _OF_NAME, "instance": _ONE, "if": _IF},
        waits_for_commit=True,
        needs_write_access=True,
    ),
    "resolve": Command(
        "Return a `ready` instance of the best priority, in turn; with `all`, all `ready` ones; "
        "with `wait`, once one accepts connections.",
        "the fields of the instance; with `all`: `instances` `rev`, and `more` if there are more",
        {
            "name": _OF_NAME,
            "instance": Argument(INSTANCE, "only this one; any when left out"),
            "meta": Argument(META, "only instances that have all of it"),
            "all": Argument(FLAG, "all instances in one reply, the best priority first"),
            "wait": Argument(WAIT, "wait up to so long for one that accepts connections"),
        },
    ),
    "list": Command(
        "List registrations of any state, in order of name and instance, in pages.",
        "`epoch` `rev` `instances`, and `next` if there are more",
        {
            "name": Argument(PATTERN, "only these"),
            "meta": Argument(META, "only those that have all of it"),
            "after": Argument(PLACE, "continue after this place"),
            "limit": Argument(LIMIT, "instances per page"),
        },
    ),
    "update": Command(
        "Replace the `meta` of a registration, or set its `state` or `priority`.",
        "`rev`",
        {
            "name": _OF_NAME,
            "instance": _ONE,
            "meta": Argument(META, "labels, which replace all present ones"),
            "state": Argument(STATE, "only `ready` is resolved"),
            "priority": Argument(PRIORITY, "lower is preferred"),
            "if": _IF,
        },
        waits_for_commit=True,
        needs_write_access=True,
    ),
    "renew": Command(
        "Renew a lease. This is no change and causes no event.",
        "`ttl`, from now",
        {
            "name": _OF_NAME,
            "instance": _ONE,
            "ttl": Argument(TTL, "for so long this time; as registered when left out"),
        },
        needs_write_access=True,
    ),
    "watch": Command(
        "Send the registrations, `sync`, and then every change as it is committed.",
        "`watch` (its number) `epoch` `rev`, then events",
        {
            "name": Argument(PATTERN, "only these"),
            "meta": Argument(META, "only those that have all of it"),
            "epoch": Argument(EPOCH, "resume after `since`, a revision of this epoch"),
            "since": Argument(REVISION, "the `rev` of the last event received"),
        },
    ),
    "unwatch": Command(
        "End a watch of this connection.",
        "nothing else",
        {"watch": Argument(NUMBER, "its number", required=True)},
    ),
    "why": Command(
        "Explain the state of a name: holders, since when, the last probe, and departures.",
        "`instances` `departures`",
        {"name": _OF_NAME, "instance": Argument(INSTANCE, "only this one; any when left out")},
    ),
    "history": Command(
        "Show past changes, the oldest first: the latest ones, or those after or before a point.",
        "`changes`, and `next` if there are more",
        {
            "name": Argument(NAME, "only of this service"),
            "instance": Argument(INSTANCE, "only of this one; any when left out"),
            "since": Argument(REVISION, "those after this revision; `next` is the `since` of the following page"),
            "before": Argument(REVISION, "those before this revision; `next` is the `before` of the page before"),
            "age_s": Argument(AGE, "those of the last so many seconds; `next` is a `since`"),
            "limit": Argument(LIMIT, "changes per page; 100 when left out"),
        },
    ),
    "stats": Command("Show counters, gauges and the limits in use.", "see the example", {}),
}


def nearest_word(word: str, words: Mapping[str, object]) -> list[str]:
    """Return the most similar of `words`; an empty list if none is similar."""
    return get_close_matches(word[:64], words, n=1)


def check_request(cmd: str, id: str | int | None, arguments: Mapping[str, object]) -> Request:
    """Return the request for a command and its arguments, if they are valid.

    Raises:
        Refused: `unknown_command`, or `bad_argument` with `field`.
    """
    command = COMMANDS.get(cmd)
    if command is None:
        near = nearest_word(cmd, COMMANDS)
        hint = f"did you mean {near[0]!r}?" if near else '{"cmd":"help"} lists them'
        raise Refused(Code.UNKNOWN_COMMAND, f"no command {cmd[:64]!r}; {hint}", near=near)
    checked: dict[str, Any] = {}
    name = ""
    try:
        for name, value in arguments.items():
            check_value = command.checks.get(name)
            if check_value is None:
                raise _unknown_argument(cmd, command, name)
            checked[name] = check_value(value)
    except Invalid as error:
        raise Refused(Code.BAD_ARGUMENT, f"{name} {error}", field=name) from None
    for name in command.required:
        if name not in checked:
            raise Refused(Code.BAD_ARGUMENT, f"{cmd} needs {name}: {command.arguments[name].doc}", field=name)
    return Request(cmd, id, checked)


def _unknown_argument(cmd: str, command: Command, name: str) -> Refused:
    near = nearest_word(name, command.arguments)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif command.arguments:
        hint = f"it takes {', '.join(command.arguments)}"
    else:
        hint = "it takes none"
    return Refused(Code.BAD_ARGUMENT, f"{cmd} has no argument {name[:64]!r}; {hint}", field=name[:64], near=near)


def describe_commands(topic: str | None = None) -> dict[str, object]:
    """Return the field `commands` of the reply to `help`: all commands, or only `topic`."""
    return {
        name: {
            "doc": command.doc,
            "result": command.result,
            "args": {
                key: {"type": argument.kind.word, "required": argument.required, "doc": argument.doc}
                for key, argument in command.arguments.items()
            },
        }
        for name, command in COMMANDS.items()
        if topic is None or name == topic
    }
