"""The one table of what `regctl` understands: its parser, its help, its manual and its completion come from it.

Must not know what a command does, or how anything is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import regd
from regd.cli.output import Output, complain, say_json

USAGE = 2  # the exit status for what cannot be understood
DOC = "Ask and change the service registry of this machine."
_WIDTH = 80  # of a terminal, and of a text that is read well
STATUSES = {
    0: "done",
    1: "not found or not in time",
    USAGE: "bad usage",
    3: "no daemon",
    4: "refused otherwise",
}


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3_600:
        raise argparse.ArgumentTypeError(f"must be 0 to 3600 seconds, not {text!r}")
    return seconds


def _interval(text: str) -> float:
    return max(0.1, _seconds(text))  # more often is no use to anybody's eyes


def _port(text: str) -> int | None:
    if text == "auto":
        return None
    if not _is_port(text):
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, or auto, not {text!r}")
    return int(text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65_535


def _endpoint(text: str) -> tuple[str | None, int]:
    """Read [HOST:]PORT; the host is None where only the port is given."""
    host, colon, port = text.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    if not _is_port(port) or (colon and not host) or (":" in host and not in_brackets):
        raise argparse.ArgumentTypeError(
            f"must be PORT or HOST:PORT, such as 5432 or [::1]:5432, with a port from 1 to 65535, not {text!r}"
        )
    return host.removeprefix("[").removesuffix("]") or None, int(port)


def _ttl(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"must be 1 to 86400 seconds, not {text!r}")
    return int(seconds) if seconds.is_integer() else seconds


class Parameter:
    """One argument of a command. `takes` says what a shell may offer for it besides its choices: `service`,
    `command`, or nothing.
    """

    def __init__(self, name: str, doc: str, *, takes: str = "", **how: Any) -> None:
        self.name = name
        self.doc = doc
        self.takes = takes
        self.how = how  # as argparse has it

    @property
    def is_option(self) -> bool:
        return self.name.startswith("-")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(self.name, help=self.doc, **self.how)


class Subcommand:
    """`doc` is one sentence, `more` what there is to know besides, `examples` lines for a shell."""

    def __init__(
        self,
        doc: str,
        *arguments: Parameter,
        more: str = "",
        examples: Sequence[str] = (),
        aliases: Sequence[str] = (),
        runs: bool = False,
    ) -> None:
        self.doc = doc
        self.arguments = arguments
        self.more = more
        self.examples = examples
        self.aliases = aliases
        self.runs = runs  # a command line of its own, behind `--`


def _labels(doc: str) -> Parameter:
    return Parameter("--meta", f"{doc}; may be given again", type=_label, action="append", metavar="KEY=VALUE")


NAME = Parameter("name", "the service", metavar="NAME", takes="service")
PATTERN = Parameter(
    "name", "only this, or what begins with it: 'work*'", nargs="?", metavar="NAME", takes="service"
)
ANY_INSTANCE = Parameter("--instance", "only this instance (default: any)", metavar="INSTANCE")
INSTANCE = Parameter("--instance", 'which instance (default: "")', metavar="INSTANCE")
FILTER = _labels("only those that carry it")
STATES = ("starting", "ready", "draining")
FORMATS = ("shell", "docker")
SHELLS = ("bash", "zsh", "fish")
PAGES = ("regctl", "regd")

COMMON = (
    Parameter(
        "--address",
        "tcp://HOST:PORT, HOST:PORT or unix:///path (default: $REGD_ADDRESS, else tcp://127.0.0.1:7343)",
        default=argparse.SUPPRESS,
        metavar="ADDRESS",
    ),
    Parameter(
        "--json",
        "print what the daemon says, one JSON object a line",
        action="store_true",
        default=argparse.SUPPRESS,
    ),
)

COMMANDS = {
    "list": Subcommand(
        "List registrations.", PATTERN, FILTER, examples=["regctl list", "regctl list 'work*'"], aliases=["ls"]
    ),
    "resolve": Subcommand(
        "Print the address of a ready instance.",
        NAME,
        Parameter("--all", "of all ready instances", action="store_true"),
        ANY_INSTANCE,
        FILTER,
        examples=["curl http://$(regctl resolve web)/"],
    ),
    "register": Subcommand(
        "Register a service; it stays until it is deregistered.",
        Parameter("name", "the service", metavar="NAME"),
        Parameter(
            "port",
            "where it listens: PORT or HOST:PORT, such as 5432 or [::1]:5432",
            metavar="PORT",
            type=_endpoint,
        ),
        Parameter("--host", "the same as HOST:PORT (default: 127.0.0.1)", metavar="HOST"),
        INSTANCE,
        _labels("a label"),
        Parameter("--state", "starting, ready or draining (default: ready)", choices=STATES, metavar="STATE"),
        Parameter("--ttl", "end it unless it is registered again in time", type=_ttl, metavar="SECONDS"),
        Parameter("--pid", "end it with this process", type=int, metavar="PID"),
        Parameter("--force", "replace a registration whose owner lives", action="store_true"),
        examples=["regctl register db 5432", "regctl register db [::1]:5432 --pid $$"],
    ),
    "deregister": Subcommand(
        "End a registration.", NAME, INSTANCE, examples=["regctl deregister db"], aliases=["rm"]
    ),
    "update": Subcommand(
        "Change the state or the labels of a registration.",
        NAME,
        INSTANCE,
        Parameter("--state", "starting, ready or draining", choices=STATES, metavar="STATE"),
        _labels("a label; replaces all that were there"),
        examples=["regctl update db --state starting", "regctl update db --meta zone=a --meta role=primary"],
    ),
    "drain": Subcommand(
        "Set the state of a registration to draining: it is resolved no more, and stays registered.",
        NAME,
        INSTANCE,
        more="The same as `regctl update NAME --state draining`.",
        examples=["regctl drain web", "regctl update web --state ready"],
    ),
    "watch": Subcommand(
        "Show what is there, and then every change, until Ctrl-C.",
        PATTERN,
        FILTER,
        more="It outlives a restart of the daemon: it connects again, and shows what is different. stderr says "
        "when the daemon is away.",
        examples=["regctl watch", "regctl watch 'work*'"],
    ),
    "wait": Subcommand(
        "Wait until each of the services accepts connections.",
        Parameter("names", "the services", nargs="+", metavar="NAME", takes="service"),
        Parameter("--timeout", "for all of them (default: 30)", type=_seconds, default=30.0, metavar="SECONDS"),
        more="It waits for the daemon, too.",
        examples=["regctl wait db cache --timeout 10 && ./migrate"],
    ),
    "run": Subcommand(
        "Run a command under a name, from when it accepts connections until it has ended.",
        Parameter("name", "the service that the command is", metavar="NAME"),
        Parameter(
            "--port",
            "where the command listens; auto: a free port, told in $PORT (default: auto)",
            type=_port,
            metavar="N|auto",
        ),
        Parameter(
            "--socket",
            "hand the command a listening socket, as systemd does: $LISTEN_FDS, file 3",
            action="store_true",
        ),
        Parameter(
            "--wait",
            "first wait until these accept connections; the command finds them in its environment",
            nargs="+",
            action="extend",
            default=[],
            metavar="OTHER",
            takes="service",
        ),
        Parameter(
            "--timeout",
            "for all that is waited for (default: 30)",
            type=_seconds,
            default=30.0,
            metavar="SECONDS",
        ),
        INSTANCE,
        _labels("a label"),
        more="`--` may be left out, but not behind `--wait OTHER ...`. Signals and the exit status are passed "
        "on; 126: the command cannot be run, 127: it is not there. On SIGTERM and Ctrl-C the name goes first. "
        "Without a daemon the command runs, and is registered as soon as there is one.",
        examples=[
            "regctl run web --wait db -- sh -c 'exec python3 -m http.server --bind 127.0.0.1 \"$PORT\"'",
            "regctl run web --port 8000 -- gunicorn --bind 127.0.0.1:8000 shop.wsgi",
            "regctl run web --socket -- uvicorn --fd 3 shop:app",
        ],
        runs=True,
    ),
    "env": Subcommand(
        "Print the addresses of services as environment variables.",
        Parameter("names", "the services (default: all)", nargs="*", metavar="NAME", takes="service"),
        Parameter(
            "--format",
            "shell: quoted for eval; docker: not quoted, for docker run --env-file (default: shell)",
            choices=FORMATS,
            default=FORMATS[0],
            metavar="FORMAT",
        ),
        more="For `shop.db`: SHOP_DB_HOST, SHOP_DB_PORT and SHOP_DB_ADDRESS, which is HOST:PORT. It is the name "
        "in capitals, with `_` for all that is no letter and no digit, and before a digit at the beginning. "
        "After `set -a` the shell exports them.",
        examples=[
            'eval "$(regctl env db)"',
            'set -a; eval "$(regctl env db cache)"; ./worker',
            "regctl env --format docker > services.env",
        ],
    ),
    "why": Subcommand(
        "Tell what is known of a service: owners, last probe, who left and why.",
        NAME,
        ANY_INSTANCE,
        examples=["regctl why web"],
    ),
    "top": Subcommand(
        "Show the registry live: what is there, what came and went, how much is asked.",
        PATTERN,
        Parameter(
            "--interval",
            "between two looks at the daemon's figures, 0.1 to 3600 (default: 1)",
            type=_interval,
            default=1.0,
            metavar="SECONDS",
        ),
        more="Keys: q ends, ? shows the others. It outlives the daemon's restart. With the extra `top` "
        "(prompt_toolkit) it has a selection, filters and `why`; without, it is a plain table. Where "
        "stdout is no terminal it prints one frame and ends; so it does with --json.",
        examples=["regctl top", "regctl top 'work*'", "regctl top --json | jq .stats.lag_s"],
    ),
    "ping": Subcommand("Ask whether a daemon answers.", examples=["regctl ping"]),
    "stats": Subcommand(
        "Show the daemon's counters.",
        Parameter("--limits", "show the limits in use, too", action="store_true"),
        examples=["regctl stats", "regctl stats --limits"],
    ),
    "doctor": Subcommand(
        "Look at the usual troubles, and say what to do.",
        more="A line for each: the address, the daemon, others beside it, rights, versions, the registry's file, "
        "limits, lag, and services that accept no connection. It changes nothing. Exit status 1: something is "
        "wrong.",
        examples=["regctl doctor"],
    ),
    "names": Subcommand(
        "Print the names of services, at once or not at all.",
        PATTERN,
        more="For completion in shells: where no daemon answers within 0.2 s it prints and says nothing.",
        examples=["regctl names 'work*'"],
    ),
    "completion": Subcommand(
        "Print what makes a shell complete the command lines of regctl.",
        Parameter("shell", "bash, zsh or fish", choices=SHELLS, metavar="SHELL"),
        examples=[
            'eval "$(regctl completion bash)"',
            'regctl completion zsh > "${fpath[1]}/_regctl"',
            "regctl completion fish > ~/.config/fish/completions/regctl.fish",
        ],
    ),
    "help": Subcommand(
        "Tell how regctl is used, or one of its commands.",
        Parameter("topic", "the command", nargs="?", metavar="COMMAND", takes="command"),
        examples=["regctl help", "regctl help run"],
    ),
    "manual": Subcommand(
        "Print the manual as a page for man.",
        Parameter(
            "page", "regctl or regd (default: regctl)", nargs="?", choices=PAGES, default=PAGES[0], metavar="PAGE"
        ),
        examples=["regctl manual | man -l -", "regctl manual regd > ~/.local/share/man/man1/regd.1"],
    ),
}


ALIASES = {alias: name for name, command in COMMANDS.items() for alias in command.aliases}


def unknown(command: str) -> str:
    """Return what to say of a command that is none."""
    near = difflib.get_close_matches(command, (*COMMANDS, *ALIASES), 1)
    return f"no command {command!r}; " + (
        f"did you mean {near[0]!r}?" if near else "`regctl help` names them all"
    )


class _Parser(argparse.ArgumentParser):
    shown: Callable[[str], str]
    as_json = False

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, f"{_Parser.shown(message)} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help, usage or version as everything else is written."""
        if file is sys.stderr:
            complain(message.rstrip("\n"))
        else:
            Output.write(message)


def refuse(prog: str, message: str) -> NoReturn:
    """Say what is wrong with the command line, and end with the status for that."""
    if not _Parser.as_json:
        complain(f"{prog}: {message}")
    elif any(prog == f"regctl {name}" and command.runs for name, command in COMMANDS.items()):
        complain(json.dumps({"event": "refused", "error": "bad_argument", "message": message}))
    else:
        say_json({"ok": False, "error": "bad_argument", "message": message})
    raise SystemExit(USAGE)


class _Whole(_Parser):
    def format_help(self) -> str:
        found = pages()
        return super().format_help() + (f"\nPages: {found}\n" if found else "")


def pages() -> str:
    """Return the folder of the pages: where they are installed, else the checkout, else nothing."""
    from importlib import metadata
    from pathlib import Path

    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that was never installed
        for each in metadata.files("regd") or ():
            if each.match("share/doc/regd/README.md"):
                return str(Path(str(each.locate())).resolve().parent)
    checkout = Path(*regd.__path__).resolve().parent
    return str(checkout) if (checkout / "README.md").exists() else ""


def _common() -> _Parser:
    made = _Parser(prog="regctl", add_help=False)
    for each in COMMON:
        each.add_to(made)
    return made


def parser(shown: Callable[[str], str]) -> argparse.ArgumentParser:
    """Return what reads a command line; `shown` makes a text fit for a terminal."""
    _Parser.shown = staticmethod(shown)
    common = _common()
    made = _Whole(
        prog="regctl",
        description=DOC,
        epilog="Exit status: " + ", ".join(f"{number} {means}" for number, means in STATUSES.items()) + ".",
        parents=[common],
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"regctl {regd.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        each = commands.add_parser(
            name,
            aliases=command.aliases,
            help=command.doc,
            description="\n\n".join(textwrap.fill(text, _WIDTH) for text in (command.doc, command.more) if text),
            epilog="examples:\n" + "".join(f"  {line}\n" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
            allow_abbrev=False,
        )
        for argument in command.arguments:
            argument.add_to(each)
        if command.runs:
            each.usage = f"{each.format_usage().removeprefix('usage: ').strip()} -- COMMAND [ARGUMENT ...]"
    return made


def read(argv: Sequence[str], shown: Callable[[str], str]) -> dict[str, Any]:
    """Return what a command line says; for `run`, what it is to run is its `argv`."""
    made = parser(shown)
    own, behind = _split(argv)
    _Parser.as_json = "--json" in own
    _check_command(made, own)
    given = vars(made.parse_args(own))
    given["command"] = ALIASES.get(given["command"], given["command"])
    if COMMANDS[given["command"]].runs:
        if not behind:
            missing = "name the command, behind `--`"
            if given["wait"]:
                missing = "put `--` before the command: --wait takes all words up to it"
            refuse(f"regctl {given['command']}", missing)
        given["argv"] = behind
    elif given["command"] == "register":
        host, given["port"] = given["port"]
        if host is not None and given["host"] is not None:
            refuse("regctl register", "give the host once: as HOST:PORT, or as --host")
        given["host"] = host or given["host"]
    return given


def _check_command(made: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Show the help where there is no command, and what was perhaps meant where there is none of that name."""
    rest = _common().parse_known_args(argv)[1]
    words = [word for word in rest if not word.startswith("-")]
    if words and words[0] not in COMMANDS and words[0] not in ALIASES:
        refuse("regctl", _Parser.shown(unknown(words[0])))
    if not rest and _Parser.as_json:
        refuse("regctl", "name a command; `regctl help` names them all")
    if not rest:
        made.print_help()
        made.exit()


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line of `run` into its own words and the command: at `--`, or behind the name.

    An option that takes many words takes all up to the next option. Where it has taken the name too, as in
    `run --wait db web -- ./server`, the last of them is the name.
    """
    own = list(argv)
    options = {each.name: each for each in COMMON}
    runs_at = names = last_of_many = at = 0
    while at < len(own):
        word = own[at]
        if word == "--":
            break
        if word.startswith("-"):
            words = _words(options.get(word), own[at + 1 :])
            at += words
            last_of_many = at if words > 1 else last_of_many
        elif not runs_at:
            if word not in COMMANDS or not COMMANDS[word].runs:
                return own, []
            runs_at = at + 1
            options |= {each.name: each for each in COMMANDS[word].arguments}
        elif names:
            return own[:at], own[at:]
        else:
            names = 1
        at += 1
    if not runs_at:
        return own, []
    own, behind = own[:at], own[at + 1 :]
    if not names and last_of_many:
        own.insert(runs_at, own.pop(last_of_many))
    return own, behind


def _words(option: Parameter | None, following: list[str]) -> int:
    """Return how many of the words behind an option are its values; None is one that is unknown, or has a `=`."""
    if option is None or option.how.get("action") == "store_true":
        return 0
    if option.how.get("nargs") != "+":
        return 1
    return next((at for at, word in enumerate(following) if word.startswith("-")), len(following))
