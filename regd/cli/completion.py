"""`regctl completion`: the completion scripts for bash, zsh and fish.

Each script contains the commands, aliases and options, and calls `regctl names` for the names of services. After
the `--` of `regctl run`, the script lets the shell complete the command line of the other program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources

from regd.cli.arguments import Parameter
from regd.cli.commands import ALIASES, COMMANDS, COMMON

_HELP = Parameter("--help", "show this help and exit", action="help")
_VERSION = Parameter("--version", "show the version and exit", action="version")
_EXITING = ("help", "version")  # actions of options after which no other argument is completed
_RUNNING = [name for name, command in COMMANDS.items() if command.runs]


def script(shell: str) -> str:
    """Return the script for `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _template(shell: str) -> str:
    """Return the template of a script, with placeholders of the form @NAME@."""
    return (resources.files(__package__) / f"completion.{shell}").read_text("utf-8")


def values(parameter: Parameter) -> str:
    """Return the number of values of a parameter: "none", "one", or "many" (all words up to the next option)."""
    if parameter.options.get("action") in ("store_true", *_EXITING):
        return "none"
    return "many" if parameter.options.get("nargs") in ("+", "*") else "one"


def is_repeatable(parameter: Parameter) -> bool:
    """Return whether an option may occur more than once."""
    return parameter.options.get("action") in ("append", "extend")


def _options(command: str) -> list[Parameter]:
    return [*(parameter for parameter in COMMANDS[command].parameters if parameter.is_option), *COMMON, _HELP]


def _offer(parameter: Parameter) -> str:
    """Return the completions for a parameter: words, or "service" for names of services, or "" for none."""
    if parameter.completion == "command":
        return " ".join(COMMANDS)
    return parameter.completion or " ".join(parameter.options.get("choices", ()))


def _places(command: str) -> Iterator[tuple[str, str]]:
    """Yield the completions for each option and argument of a command.

    A place is the name of an option, the position of an argument, or `*` for all further positions.
    """
    number = 0
    for parameter in COMMANDS[command].parameters:
        if parameter.is_option:
            place = parameter.name
        else:
            place, number = "*" if values(parameter) == "many" else str(number), number + 1
        if _offer(parameter):
            yield place, _offer(parameter)


def _options_with_values() -> list[tuple[str, str, str]]:
    """Return the options with values as (command, option, "one" or "many"); the command `*` means all."""
    own = [
        (name, parameter.name, values(parameter))
        for name, command in COMMANDS.items()
        for parameter in command.parameters
        if parameter.is_option
    ]
    common = [("*", parameter.name, values(parameter)) for parameter in COMMON]
    return [row for row in own + common if row[2] != "none"]


# bash


def _bash() -> str:
    options = [f"    {name}) found='{_bash_options(_options(name))}' ;;" for name in COMMANDS]
    options.append(f"    *) found='{_bash_options((*COMMON, _HELP, _VERSION))}' ;;")
    takes = [f"    {command}:{option}) found={many} ;;" for command, option, many in _options_with_values()]
    offers = [
        f"    {command}:{'[0-9]*' if place == '*' else place}) found='{offer}' ;;"
        for command in COMMANDS
        for place, offer in _places(command)
    ]
    return (
        _template("bash")
        .replace("@OPTIONS@", "\n".join(options))
        .replace("@TAKES@", "\n".join(takes))
        .replace("@OFFERS@", "\n".join(offers))
        .replace("@COMMANDS@", " ".join(COMMANDS))
        .replace(
            "@ALIASES@",
            "\n".join(f"                {alias}) command={name} ;;" for alias, name in ALIASES.items()),
        )
        .replace("@RUNNING@", "|".join(_RUNNING))
    )


def _bash_options(parameters: Iterable[Parameter]) -> str:
    """Return the options as one string; `*` follows a repeatable option."""
    return " ".join(parameter.name + "*" * is_repeatable(parameter) for parameter in parameters)


# zsh


def _zsh() -> str:
    return (
        _template("zsh")
        .replace("@COMMON@", _zsh_lines(map(_zsh_option, (*COMMON, _HELP, _VERSION))))
        .replace(
            "@COMMANDS@",
            "\n".join(f"        {_quoted(f'{name}:{command.doc}')}" for name, command in COMMANDS.items()),
        )
        .replace("@EACH@", "\n".join(map(_zsh_command, COMMANDS)))
        .replace("@MANY@", "|".join({option for _, option, many in _options_with_values() if many == "many"}))
        .replace("@RUNNING@", "|".join(_RUNNING))
    )


def _zsh_command(name: str) -> str:
    parameters = COMMANDS[name].parameters
    specs = [
        *map(_zsh_option, _options(name)),
        *(_zsh_word(parameter) for parameter in parameters if not parameter.is_option),
    ]
    lines = _zsh_lines(specs, indent=12)
    return f"    {'|'.join((name, *COMMANDS[name].aliases))})\n        _arguments -S \\\n{lines}\n        ;;"


def _zsh_lines(specs: Iterable[str], indent: int = 8) -> str:
    return " \\\n".join(" " * indent + _quoted(spec) for spec in specs)


def _zsh_option(parameter: Parameter) -> str:
    shown = f"{'*' if is_repeatable(parameter) else ''}{parameter.name}"
    if parameter.options.get("action") in _EXITING:
        return f"(- *){shown}[{parameter.doc}]"
    if values(parameter) == "none":
        return f"{shown}[{_zsh_text(parameter.doc)}]"
    return f"{shown}=[{_zsh_text(parameter.doc)}]:{parameter.options['metavar']}:{_zsh_offer(parameter)}"


def _zsh_word(parameter: Parameter) -> str:
    colons = {"?": "::"}.get(str(parameter.options.get("nargs")), ":")
    place = "*" if values(parameter) == "many" else ""
    return f"{place}{colons}{parameter.options['metavar']}:{_zsh_offer(parameter)}"


def _zsh_offer(parameter: Parameter) -> str:
    offer = _offer(parameter)
    if parameter.completion == "command":
        return "_regctl_commands"
    if parameter.completion == "service":
        return "_regctl_names"
    return f"({offer})" if offer else " "


def _zsh_text(text: str) -> str:
    return text.replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


# fish


def _fish() -> str:
    aliases = [
        f"                    case {alias}\n                        set command {name}"
        for alias, name in ALIASES.items()
    ]
    takes = [
        f"        case '{command}:{option}'\n            echo {many}"
        for command, option, many in _options_with_values()
    ]
    lines = [
        f"complete -c regctl -n __regctl_at_start -a {name} -d {_fish_text(COMMANDS[name].doc)}"
        for name in COMMANDS
    ]
    lines += [_fish_option("__regctl_at_start", option) for option in (*COMMON, _HELP, _VERSION)]
    for name in COMMANDS:
        lines += [_fish_option(f"__regctl_in {name}", option) for option in _options(name)]
        lines += [
            f"complete -c regctl -n '__regctl_at {name} {_quoted_star(place)}' -a {_fish_offer(offer)}"
            for place, offer in _places(name)
            if not place.startswith("-") or _is_many(name, place)
        ]
    return (
        _template("fish")
        .replace("@TAKES@", "\n".join(takes))
        .replace("@ALIASES@", "\n".join(aliases))
        .replace("@COMPLETE@", "\n".join(lines))
        .replace("@RUNNING@", " ".join(_RUNNING))
    )


def _is_many(command: str, option: str) -> bool:
    return (command, option, "many") in _options_with_values()


def _quoted_star(place: str) -> str:
    return '"*"' if place == "*" else place


def _fish_option(condition: str, parameter: Parameter) -> str:
    is_exiting = parameter.options.get("action") in _EXITING
    once = "" if is_exiting or is_repeatable(parameter) else f"; and not __regctl_gave {parameter.name}"
    line = f"complete -c regctl -n '{condition}{once}' -l {parameter.name[2:]} -d {_fish_text(parameter.doc)}"
    if values(parameter) == "none":
        return line
    return line + " -x" + (f" -a {_fish_offer(_offer(parameter))}" if _offer(parameter) else "")


def _fish_offer(offer: str) -> str:
    return "'(__regctl_names)'" if offer == "service" else f"'{offer}'"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"
