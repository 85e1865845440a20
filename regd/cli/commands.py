"""The table of regctl's commands, from which its parser, help, manual and completion are generated."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import regd
from regd.cli.arguments import Parameter, Parser, UsageError, integer, port_or_off, seconds
from regd.cli.output import visible

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_COUNT_MAX = 36_500  # the largest count of a unit; in days, a hundred years
DOC = "Query and change the service registry of this machine."
HTTP_PORT, DNS_PORT = 7_380, 7_353  # of `regctl serve`
BRIDGE_PREFIX = "/regd/v1/default/"
NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4  # exit statuses
STATUSES = {
    0: "done",
    NOT_FOUND: "not found or not in time",
    USAGE: "bad usage",
    NO_DAEMON: "no daemon",
    REFUSED: "refused otherwise",
}


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key, value


def _port(text: str) -> int | str:
    if text == "auto":
        return text
    port = integer(text, 1, 65_535)
    if port is None:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, or auto, not {text!r}")
    return port


def _priority(text: str) -> int:
    priority = integer(text, 0, 65_535)
    if priority is None:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {text!r}")
    return priority


def _endpoint(text: str) -> tuple[str | None, int]:
    """Parse [HOST:]PORT. The host is None if it is left out."""
    host, colon, digits = text.rpartition(":")
    port = integer(digits, 1, 65_535)
    in_brackets = host.startswith("[") and host.endswith("]")
    if port is None or (colon and not host) or (":" in host and not in_brackets):
        raise argparse.ArgumentTypeError(
            f"must be PORT or HOST:PORT, such as 5432 or [::1]:5432, with a port from 1 to 65535, not {text!r}"
        )
    return host.removeprefix("[").removesuffix("]") or None, port


def _path(text: str) -> str:
    """Check the path of a URL, perhaps with a query, since it becomes part of an HTTP request line."""
    if not text.startswith("/") or not all("!" <= letter <= "~" for letter in text):
        raise argparse.ArgumentTypeError(f"must be a path such as /healthz, ASCII without blanks, not {text!r}")
    return text


def _ttl(text: str) -> float:
    ttl_s = seconds(1, 86_400)(text)
    return int(ttl_s) if ttl_s.is_integer() else ttl_s


def _endpoints(text: str) -> tuple[str, ...]:
    """Parse HOST:PORT,HOST:PORT."""
    endpoints = tuple(part.strip() for part in text.split(","))
    try:
        are_complete = all(_endpoint(endpoint)[0] is not None for endpoint in endpoints)
    except argparse.ArgumentTypeError:
        are_complete = False
    if not are_complete:
        raise argparse.ArgumentTypeError(
            f"must be HOST:PORT, or several with commas between, such as 10.0.0.1:2379, not {text!r}"
        )
    return endpoints


def _since(text: str) -> tuple[str, float]:
    """Parse a duration or a revision. Return the name of the argument in the protocol, and its value."""
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS and (count := integer(number, 0, _COUNT_MAX)) is not None:
        return "age_s", count * _UNITS[unit]
    if (rev := integer(text, 0, 2**63 - 1)) is not None:
        return "since", rev
    raise argparse.ArgumentTypeError(
        f"must be a time such as 30s, 10m, 2h or 7d, or the number of a revision, not {text!r}"
    )


class Subcommand:
    """A command of regctl.

    `doc` is one sentence, `more` has further sentences, `examples` are shell command lines. `runs` says whether
    the arguments end with the command line of another program, as in `regctl run`.
    """

    def __init__(
        self,
        doc: str,
        *parameters: Parameter,
        more: str = "",
        examples: Sequence[str] = (),
        aliases: Sequence[str] = (),
        runs: bool = False,
    ) -> None:
        self.doc = doc
        self.parameters = parameters
        self.more = more
        self.examples = examples
        self.aliases = aliases
        self.runs = runs


def _labels(doc: str) -> Parameter:
    return Parameter("--meta", f"{doc}; repeatable", type=_label, action="append", metavar="KEY=VALUE")


def _preference(default: str) -> Parameter:
    doc = f"0 to 65535: the ready instances with the lowest number are resolved{default}"
    return Parameter("--priority", doc, type=_priority, metavar="N")


def _timeout(doc: str) -> Parameter:
    return Parameter("--timeout", f"{doc} (default: 30)", type=seconds(0, 3_600), default=30.0, metavar="SECONDS")


def _services(name: str, doc: str, nargs: str) -> Parameter:
    return Parameter(name, doc, nargs=nargs, metavar="NAME", completion="service")


NAME = Parameter("name", "the service", metavar="NAME", completion="service")
PATTERN = _services("name", "this service, or all with this prefix: 'work*' (default: all)", "?")
ANY_INSTANCE = Parameter("--instance", "this instance only (default: any)", metavar="INSTANCE")
INSTANCE = Parameter("--instance", 'the instance (default: "")', metavar="INSTANCE")
FILTER = _labels("only instances with this label")
STATES = ("starting", "ready", "draining")
FORMATS = ("shell", "docker")
SHELLS = ("bash", "zsh", "fish")
PAGES = ("regctl", "regd")

COMMON = (
    Parameter(
        "--address",
        "tcp://HOST:PORT, HOST:PORT or unix:///path (default: $REGD_ADDRESS, else the project "
        "registry, else tcp://127.0.0.1:7343)",
        default=argparse.SUPPRESS,
        metavar="ADDRESS",
    ),
    Parameter(
        "--json",
        "print the daemon's reply, one JSON object per line",
        action="store_true",
        default=argparse.SUPPRESS,
    ),
)

COMMANDS = {
    "list": Subcommand(
        "List registrations.", PATTERN, FILTER, examples=["regctl list", "regctl list 'work*'"], aliases=["ls"]
    ),
    "resolve": Subcommand(
        "Print the address of a ready instance, of the best priority.",
        NAME,
        Parameter(
            "--all", "print the addresses of all ready instances, the best priority first", action="store_true"
        ),
        ANY_INSTANCE,
        FILTER,
        examples=["curl http://$(regctl resolve web)/"],
    ),
    "register": Subcommand(
        "Register a service until it is deregistered.",
        Parameter("name", "the service", metavar="NAME"),
        Parameter(
            "port",
            "where it listens: PORT or HOST:PORT, such as 5432 or [::1]:5432",
            metavar="PORT",
            type=_endpoint,
        ),
        Parameter("--host", "the host, if not written as HOST:PORT (default: 127.0.0.1)", metavar="HOST"),
        INSTANCE,
        _labels("a label"),
        Parameter("--state", "starting, ready or draining (default: ready)", choices=STATES, metavar="STATE"),
        _preference(" (default: 0)"),
        Parameter("--ttl", "expire unless registered again within this time", type=_ttl, metavar="SECONDS"),
        Parameter("--pid", "end the registration when this process exits", type=int, metavar="PID"),
        Parameter("--force", "replace a registration whose owner is alive", action="store_true"),
        examples=["regctl register db 5432", "regctl register db [::1]:5432 --pid $$"],
    ),
    "deregister": Subcommand(
        "End a registration.", NAME, INSTANCE, examples=["regctl deregister db"], aliases=["rm"]
    ),
    "update": Subcommand(
        "Change the state, the labels or the priority of a registration.",
        NAME,
        INSTANCE,
        Parameter("--state", "starting, ready or draining", choices=STATES, metavar="STATE"),
        _labels("a label; all previous labels are removed"),
        _preference(""),
        examples=[
            "regctl update db --state starting",
            "regctl update db --meta zone=a --meta role=primary",
            "regctl update db --instance 2 --priority 10",
        ],
    ),
    "drain": Subcommand(
        "Set the state of a registration to draining: it stays registered and is no longer resolved.",
        NAME,
        INSTANCE,
        more="The same as `regctl update NAME --state draining`.",
        examples=["regctl drain web", "regctl update web --state ready"],
    ),
    "watch": Subcommand(
        "Print current registrations, then every change, until Ctrl-C.",
        PATTERN,
        FILTER,
        more="Continues when the daemon restarts: regctl reconnects and prints what is different. A message on "
        "stderr says when the daemon is away.",
        examples=["regctl watch", "regctl watch 'work*'"],
    ),
    "wait": Subcommand(
        "Wait until all the services accept connections.",
        _services("names", "the services", "+"),
        _timeout("for all services together"),
        Parameter(
            "--http",
            "also wait until each service answers a GET request for this path with 2xx, not with a redirect",
            type=_path,
            metavar="PATH",
        ),
        more="Waits for the daemon too.",
        examples=["regctl wait db cache --timeout 10 && ./migrate", "regctl wait web --http /healthz"],
    ),
    "run": Subcommand(
        "Run a command and register it, from when it accepts connections until it exits.",
        Parameter("name", "the service that the command provides", metavar="NAME"),
        Parameter(
            "--port",
            "the port on which the command listens, passed in $PORT; auto: the one that the service had last, "
            "else a free one that can stay (without --port, a $PORT that you have set counts; default: auto)",
            type=_port,
            metavar="N|auto",
        ),
        Parameter(
            "--socket",
            "pass the command a listening socket, as systemd does: $LISTEN_FDS, file descriptor 3",
            action="store_true",
        ),
        Parameter(
            "--wait",
            "first wait until these services accept connections; the command gets their addresses as variables",
            nargs="+",
            action="extend",
            default=[],
            metavar="OTHER",
            completion="service",
        ),
        _timeout("for all services of --wait together"),
        Parameter(
            "--instance",
            'the instance; auto: the lowest number from 1 that no living owner holds (default: "")',
            metavar="INSTANCE",
        ),
        _labels("a label"),
        _preference(" (default: 0)"),
        Parameter(
            "--ready-http",
            "the command is ready, and resolved, once it answers a GET request for this path with 2xx",
            type=_path,
            metavar="PATH",
        ),
        Parameter(
            "--ready-command",
            "the command is ready, and resolved, once this shell command ends with status 0; it gets $PORT",
            metavar="CMD",
        ),
        more="`--` can be omitted, except after `--wait OTHER ...`. Signals and the exit status are passed on; "
        "126: the command cannot be run, 127: it does not exist. On SIGTERM and Ctrl-C the name is deregistered "
        "before the command receives the signal. Without a daemon the command runs, and is registered as soon as "
        "there is one. With --ready-http or --ready-command the command is registered as starting until it is "
        "ready; an attempt may take 5 s.",
        examples=[
            "regctl run web --wait db -- sh -c 'exec python3 -m http.server --bind 127.0.0.1 \"$PORT\"'",
            "regctl run web --port 8000 -- gunicorn --bind 127.0.0.1:8000 shop.wsgi",
            "regctl run web --socket -- uvicorn --fd 3 shop:app",
            "regctl run web --ready-http /healthz -- ./server",
        ],
        runs=True,
    ),
    "env": Subcommand(
        "Print the addresses of services as environment variables.",
        _services("names", "the services (default: all)", "*"),
        Parameter(
            "--format",
            "shell: quoted for eval; docker: unquoted, for docker run --env-file (default: shell)",
            choices=FORMATS,
            default=FORMATS[0],
            metavar="FORMAT",
        ),
        more="For `shop.db`: SHOP_DB_HOST, SHOP_DB_PORT and SHOP_DB_ADDRESS, which is HOST:PORT. The prefix is "
        "the name in capitals, with `_` in place of every character that is neither a letter nor a digit, and "
        "before a digit at the start. After `set -a` the shell exports the variables.",
        examples=[
            'eval "$(regctl env db)"',
            'set -a; eval "$(regctl env db cache)"; ./worker',
            "regctl env --format docker > services.env",
        ],
    ),
    "why": Subcommand(
        "Explain the state of a service: its owners, the last probe, recent departures.",
        NAME,
        ANY_INSTANCE,
        examples=["regctl why web"],
    ),
    "history": Subcommand(
        "Show past changes: when, what, where, why and by whom.",
        Parameter("name", "this service (default: all)", nargs="?", metavar="NAME", completion="service"),
        ANY_INSTANCE,
        Parameter(
            "--since",
            "all changes of the last 30s, 10m, 2h or 7d, say, or after this revision (default: the last 100)",
            type=_since,
            metavar="TIME|REV",
        ),
        Parameter("--follow", "go on with new changes, until Ctrl-C", action="store_true"),
        more="The history survives restarts of the daemon. With --follow, --json prints one change per line.",
        examples=["regctl history", "regctl history web --since 1h", "regctl history --follow"],
    ),
    "top": Subcommand(
        "Show the registry live: instances, recent changes, rates of requests and changes.",
        PATTERN,
        Parameter(
            "--interval",
            "time between two requests for the daemon's counters, 0.1 to 3600 (default: 1)",
            type=seconds(0.1, 3_600),
            default=1.0,
            metavar="SECONDS",
        ),
        more="Keys: q quits, ? shows the others. Continues when the daemon restarts. The extra `top` "
        "(prompt_toolkit) adds selection, filter and `why`; without it the view is a plain table. If stdout is "
        "not a terminal, or with --json, regctl prints one frame and exits.",
        examples=["regctl top", "regctl top 'work*'", "regctl top --json | jq .stats.lag_s"],
    ),
    "serve": Subcommand(
        "Serve the registry over HTTP and DNS, on this machine only, until Ctrl-C.",
        Parameter(
            "--http",
            f"the port for HTTP; 0: a free one, as in a project without this option (default: {HTTP_PORT})",
            type=port_or_off,
            metavar="PORT|off",
        ),
        Parameter(
            "--dns",
            f"the port for DNS, with UDP and TCP; 0: a free one, as in a project without this option "
            f"(default: {DNS_PORT})",
            type=port_or_off,
            metavar="PORT|off",
        ),
        more="Reads the registry and never writes. Prints a line for each address once all are open. Needs the "
        "extra `serve`: pip install 'regd[serve]'. Runs without a daemon too, and finds it when it starts. In a "
        "project its ports stay the same as long as no other program takes them; `regctl where` shows them.",
        examples=["regctl serve", "regctl serve --http 8000 --dns off"],
    ),
    "bridge": Subcommand(
        "Share registrations with the daemons of other machines, through etcd, until Ctrl-C.",
        Parameter(
            "--etcd",
            "the members of etcd, with commas between",
            type=_endpoints,
            metavar="HOST:PORT[,HOST:PORT...]",
        ),
        Parameter(
            "--advertise",
            "the address of this machine for others, at which services are published that were registered on "
            "loopback (default: none, they are not published)",
            metavar="ADDRESS",
        ),
        Parameter(
            "--machine",
            "the name of this machine, 1 to 20 of a-z 0-9 - _ (default: the host name)",
            metavar="NAME",
        ),
        Parameter(
            "--prefix",
            f"what the keys in etcd begin with (default: {BRIDGE_PREFIX})",
            default=BRIDGE_PREFIX,
            metavar="PREFIX",
        ),
        Parameter(
            "--stale-s",
            "how long other machines' instances stay while etcd is away, and this machine's while the daemon is "
            "(default: 60)",
            type=seconds(1, 86_400),
            default=60.0,
            metavar="SECONDS",
        ),
        Parameter(
            "--compare-s",
            "between two comparisons of everything with etcd and the daemon (default: 60)",
            type=seconds(1, 86_400),
            default=60.0,
            metavar="SECONDS",
        ),
        Parameter("--cacert", "use TLS; etcd's certificate is signed by this authority", metavar="FILE"),
        Parameter("--cert", "the certificate of this client", metavar="FILE"),
        Parameter("--key", "the private key of this client", metavar="FILE"),
        Parameter("--user", "authenticate as this user of etcd", metavar="NAME"),
        Parameter("--password-file", "the file with the password, on one line", metavar="FILE"),
        Parameter(
            "--status",
            "show the state of the running bridge: peers, lease, lag, what is not published and why",
            action="store_true",
        ),
        more="Runs without a daemon and without etcd too, and finds them when they start. SIGTERM and Ctrl-C "
        "withdraw this machine's instances elsewhere, and others' here. Needs the extra `etcd`: "
        "pip install 'regd[etcd]'.",
        examples=[
            "regctl bridge --etcd 10.0.0.1:2379,10.0.0.2:2379 --advertise 10.0.0.7",
            "regctl bridge --status",
        ],
    ),
    "ping": Subcommand("Check whether a daemon answers.", examples=["regctl ping"]),
    "stats": Subcommand(
        "Show the daemon's counters.",
        Parameter("--limits", "also show the limits in use", action="store_true"),
        examples=["regctl stats", "regctl stats --limits"],
    ),
    "doctor": Subcommand(
        "Check for common problems, and say what to do.",
        more="Prints a line for each check: the address, the daemon, other daemons, access rights, versions, the "
        "registry file, limits, lag, and services that accept no connection. Changes nothing. Exit status 1: a "
        "check failed.",
        examples=["regctl doctor"],
    ),
    "init": Subcommand(
        "Make a registry for this folder, for all programs that are started in it and below.",
        Parameter("folder", "the folder (default: the current one)", nargs="?", default=".", metavar="FOLDER"),
        more="It is in the folder .regd, which git ignores, so that two checkouts can use the same names. Its "
        "daemon is started when a program needs it. A copy of the folder elsewhere does not count until "
        "`regctl init` is run there.",
        examples=["regctl init", "regctl init ~/shop"],
    ),
    "where": Subcommand(
        "Show which registry is used, and why.",
        more="Starts no daemon.",
        examples=["regctl where"],
    ),
    "stop": Subcommand(
        "End the daemon of a project registry, or of another Unix socket.",
        more="No registration ends: the next daemon has them.",
        examples=["regctl stop"],
    ),
    "names": Subcommand(
        "Print the names of services, for completion in shells.",
        PATTERN,
        more="Prints nothing if no daemon answers within 0.2 s.",
        examples=["regctl names 'work*'"],
    ),
    "completion": Subcommand(
        "Print a script that makes a shell complete regctl command lines.",
        Parameter("shell", "bash, zsh or fish", choices=SHELLS, metavar="SHELL"),
        examples=[
            'eval "$(regctl completion bash)"',
            'regctl completion zsh > "${fpath[1]}/_regctl"',
            "regctl completion fish > ~/.config/fish/completions/regctl.fish",
        ],
    ),
    "help": Subcommand(
        "Show help for regctl or for one of its commands.",
        Parameter("topic", "the command", nargs="?", metavar="COMMAND", completion="command"),
        examples=["regctl help", "regctl help run"],
    ),
    "manual": Subcommand(
        "Print a manual page for man.",
        Parameter(
            "page", "regctl or regd (default: regctl)", nargs="?", choices=PAGES, default=PAGES[0], metavar="PAGE"
        ),
        examples=["regctl manual | man -l -", "regctl manual regd > ~/.local/share/man/man1/regd.1"],
    ),
}

ALIASES = {alias: name for name, command in COMMANDS.items() for alias in command.aliases}


def unknown_command(word: str) -> str:
    """Return the error message for an unknown command."""
    from difflib import get_close_matches

    near = get_close_matches(word, (*COMMANDS, *ALIASES), 1)
    hint = f"did you mean {near[0]!r}?" if near else "`regctl help` lists them"
    return f"no command {visible(repr(word))}; {hint}"


class _MainParser(Parser):
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action.choices, dict) and value not in action.choices:  # the action of subcommands
            raise UsageError(self.prog, unknown_command(value))
        super()._check_value(action, value)

    def format_help(self) -> str:
        folder = documents()
        return super().format_help() + (f"\nDocuments: {folder}\n" if folder else "")


def documents() -> str:
    """Return the folder of the installed documents, else that of the checkout, else ""."""
    from importlib import metadata
    from pathlib import Path

    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that was never installed
        for file in metadata.files("regd") or ():
            if file.match("share/doc/regd/README.md"):
                return str(Path(str(file.locate())).resolve().parent)
    checkout = Path(*regd.__path__).resolve().parent
    return str(checkout) if (checkout / "README.md").exists() else ""


def parser(argv: Sequence[str]) -> Parser:
    """Return a parser for a command line.

    The parser has only the commands that occur in the line, since building all of them takes 10 ms. For help and
    errors, it has all commands.
    """
    words = set(argv)
    commands = {name: command for name, command in COMMANDS.items() if words & {name, *command.aliases}}
    if not commands or words & {"-h", "--help"}:
        commands = COMMANDS
    main = _MainParser(
        prog="regctl",
        description=DOC,
        epilog="Exit status: " + ", ".join(f"{number} {meaning}" for number, meaning in STATUSES.items()) + ".",
    )
    main.add_argument("--version", action="version", version=f"regctl {regd.__version__}")
    main.add_parameters(COMMON)
    subparsers = main.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            aliases=command.aliases,
            help=command.doc,
            description=f"{command.doc}\n\n{command.more}".rstrip(),
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
        )
        subparser.add_parameters((*COMMON, *command.parameters))
        if command.runs:
            _add_command_line(subparser)
    return main


def _add_command_line(subparser: Parser) -> None:
    subparser.usage = f"{subparser.prog} NAME [OPTION ...] [--] COMMAND [ARGUMENT ...]"
    argv = subparser.add_argument("argv", nargs=argparse.PARSER, metavar="COMMAND", help="the command to run")
    argv.required = False  # `read` reports a missing command, with a better message


def read(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a command line. For `run`, `argv` is the command to run.

    Raises:
        UsageError: the command line is invalid.
        SystemExit: after printing help or version.
    """
    main = parser(argv)
    arguments = vars(main.parse_args(argv))
    if arguments["command"] is None:
        if "json" in arguments:
            raise UsageError("regctl", "name a command; `regctl help` lists them")
        print_help()
    arguments["command"] = ALIASES.get(arguments["command"], arguments["command"])
    if COMMANDS[arguments["command"]].runs:
        arguments["argv"] = _command_line(arguments)
        if arguments["ready_http"] is not None and arguments["ready_command"] is not None:
            raise UsageError("regctl run", "give --ready-http or --ready-command, not both")
    elif arguments["command"] == "serve":
        if arguments["http"] == arguments["dns"] == "off":
            raise UsageError("regctl serve", "give a port to --http or to --dns: both are off")
    elif arguments["command"] == "bridge":
        _check_bridge(arguments)
    elif arguments["command"] == "register":
        host, arguments["port"] = arguments["port"]
        if host is not None and arguments["host"] is not None:
            raise UsageError("regctl register", "give the host once: as HOST:PORT, or as --host")
        arguments["host"] = host or arguments["host"]
    return arguments


def _check_bridge(arguments: dict[str, Any]) -> None:
    if arguments["status"]:
        return
    problem = ""
    if arguments["etcd"] is None:
        problem = "name the members of etcd: --etcd HOST:PORT,HOST:PORT"
    elif (arguments["cert"] is None) != (arguments["key"] is None):
        problem = "give --cert and --key, or neither"
    elif (arguments["user"] is None) != (arguments["password_file"] is None):
        problem = "give --user and --password-file, or neither"
    if problem:
        raise UsageError("regctl bridge", problem)


def _command_line(arguments: dict[str, Any]) -> list[str]:
    words = list(arguments["argv"] or ())
    if words[:1] == ["--"]:  # Python 3.11 does not remove it
        del words[0]
    if words:
        return words
    hint = "name the command, after `--`"
    if arguments["wait"]:
        hint = "put NAME before --wait and `--` before the command: --wait takes all words up to the next option"
    raise UsageError("regctl run", hint)


def print_help(*command: str) -> NoReturn:
    """Print the help of regctl or of one of its commands, and exit."""
    parser(command).parse_args([*command, "--help"])
    raise AssertionError("--help exits")
