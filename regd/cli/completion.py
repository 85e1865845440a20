"""Scripts that make bash, zsh and fish complete the command lines of regctl, from the one table.

Each script knows the commands, their aliases and options by itself; it asks `regctl names` for the names of
services, and has no offer where free text stands. Behind the `--` of a command that runs another, the shell goes
on as anywhere.
Must not know what a command does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources

from regd.cli.arguments import Parameter
from regd.cli.commands import ALIASES, COMMANDS, COMMON

_ALONE = {"--help": "show this help, and do nothing else", "--version": "show the version, and do nothing else"}
_HELP = {"--help": _ALONE["--help"]}
_RUNNING = [name for name, command in COMMANDS.items() if command.runs]


def script(shell: str) -> str:
    """Return the script for `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _frame(shell: str) -> str:
    """Return the part of a script that is no table; the places of the tables are @NAMED@ in it."""
    return (resources.files(__package__) / f"completion.{shell}").read_text("utf-8")


def values(argument: Parameter) -> str:
    """Return how many words belong to it: `none`, `one`, or `many`, up to the next option."""
    if argument.options.get("action") == "store_true":
        return "none"
    return "many" if argument.options.get("nargs") in ("+", "*") else "one"


def again(argument: Parameter) -> bool:
    """Return whether an option may be given more than once."""
    return argument.options.get("action") in ("append", "extend")


def _options(command: str) -> list[Parameter]:
    return [*(each for each in COMMANDS[command].parameters if each.is_option), *COMMON]


def _offer(argument: Parameter) -> str:
    """Return what may stand there: words, `service`, or nothing."""
    if argument.completion == "command":
        return " ".join(COMMANDS)
    return argument.completion or " ".join(argument.options.get("choices", ()))


def _places(command: str) -> Iterator[tuple[str, str]]:
    """Yield an option, or the number of an argument, `*` for any; and what is offered there."""
    number = 0
    for argument in COMMANDS[command].parameters:
        if argument.is_option:
            place = argument.name
        else:
            place, number = "*" if values(argument) == "many" else str(number), number + 1
        if _offer(argument):
            yield place, _offer(argument)


def _several() -> list[tuple[str, str, str]]:
    """Return the options with values: the command or `*`, the option, and how many."""
    own = [
        (name, each.name, values(each))
        for name, command in COMMANDS.items()
        for each in command.parameters
        if each.is_option
    ]
    common = [("*", each.name, values(each)) for each in COMMON]
    return [each for each in own + common if each[2] != "none"]


# bash


def _bash() -> str:
    options = [f"    *) found='{_bash_options(COMMON, _ALONE)}' ;;"]
    options[:0] = [f"    {name}) found='{_bash_options(_options(name), _HELP)}' ;;" for name in COMMANDS]
    takes = [f"    {command}:{option}) found={many} ;;" for command, option, many in _several()]
    offers = [
        f"    {command}:{'[0-9]*' if place == '*' else place}) found='{offer}' ;;"
        for command in COMMANDS
        for place, offer in _places(command)
    ]
    return (
        _frame("bash")
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


def _bash_options(arguments: Iterable[Parameter], more: Iterable[str]) -> str:
    """Those that may be given again end in `*`."""
    return " ".join([*(each.name + "*" * again(each) for each in arguments), *more])


# zsh


def _zsh() -> str:
    common = "\n".join(_zsh_lines([*map(_zsh_option, COMMON), *(_zsh_alone(*each) for each in _ALONE.items())]))
    return (
        _frame("zsh")
        .replace("@COMMON@", common)
        .replace("@COMMANDS@", "\n".join(f"        {_quoted(_zsh_described(name))}" for name in COMMANDS))
        .replace("@EACH@", "\n".join(map(_zsh_command, COMMANDS)))
        .replace("@MANY@", "|".join({option for _, option, many in _several() if many == "many"}))
        .replace("@RUNNING@", "|".join(_RUNNING))
    )


def _zsh_command(name: str) -> str:
    arguments = COMMANDS[name].parameters
    specs = [
        *map(_zsh_option, _options(name)),
        *(_zsh_alone(*each) for each in _HELP.items()),
        *(_zsh_word(each) for each in arguments if not each.is_option),
    ]
    lines = "\n".join("    " + line for line in _zsh_lines(specs))
    return f"    {'|'.join((name, *COMMANDS[name].aliases))})\n        _arguments -S \\\n{lines}\n        ;;"


def _zsh_lines(specs: list[str]) -> list[str]:
    quoted = [f"        {_quoted(each)}" for each in specs]
    return [each + " \\" for each in quoted[:-1]] + quoted[-1:]


def _zsh_described(name: str) -> str:
    return f"{name}:{COMMANDS[name].doc}"


def _zsh_option(argument: Parameter) -> str:
    shown = f"{'*' if again(argument) else ''}{argument.name}"
    if values(argument) == "none":
        return f"{shown}[{_zsh_text(argument.doc)}]"
    return f"{shown}=[{_zsh_text(argument.doc)}]:{argument.options['metavar']}:{_zsh_offer(argument)}"


def _zsh_alone(name: str, doc: str) -> str:
    return f"(- *){name}[{doc}]"


def _zsh_word(argument: Parameter) -> str:
    colons = {"?": "::"}.get(str(argument.options.get("nargs")), ":")
    place = "*" if values(argument) == "many" else ""
    return f"{place}{colons}{argument.options['metavar']}:{_zsh_offer(argument)}"


def _zsh_offer(argument: Parameter) -> str:
    offer = _offer(argument)
    if argument.completion == "command":
        return "_regctl_commands"
    if argument.completion == "service":
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
        f"        case '{command}:{option}'\n            echo {many}" for command, option, many in _several()
    ]
    lines = [
        f"complete -c regctl -n __regctl_at_start -a {name} -d {_fish_text(COMMANDS[name].doc)}"
        for name in COMMANDS
    ]
    lines += [_fish_option("__regctl_at_start", each) for each in COMMON]
    lines += [
        f"complete -c regctl -n __regctl_at_start -l {name[2:]} -d {_fish_text(doc)}"
        for name, doc in _ALONE.items()
    ]
    for name in COMMANDS:
        lines += [_fish_option(f"__regctl_in {name}", each) for each in _options(name)]
        lines += [
            f"complete -c regctl -n '__regctl_in {name}' -l {option[2:]} -d {_fish_text(doc)}"
            for option, doc in _HELP.items()
        ]
        lines += [
            f"complete -c regctl -n '__regctl_at {name} {_quoted_star(place)}' -a {_fish_offer(offer)}"
            for place, offer in _places(name)
            if not place.startswith("-") or _is_many(name, place)
        ]
    return (
        _frame("fish")
        .replace("@TAKES@", "\n".join(takes))
        .replace("@ALIASES@", "\n".join(aliases))
        .replace("@COMPLETE@", "\n".join(lines))
        .replace("@RUNNING@", " ".join(_RUNNING))
    )


def _is_many(command: str, option: str) -> bool:
    return (command, option, "many") in _several()


def _quoted_star(place: str) -> str:
    return '"*"' if place == "*" else place


def _fish_option(condition: str, argument: Parameter) -> str:
    once = "" if again(argument) else f"; and not __regctl_gave {argument.name}"
    made = f"complete -c regctl -n '{condition}{once}' -l {argument.name[2:]} -d {_fish_text(argument.doc)}"
    if values(argument) == "none":
        return made
    return made + " -x" + (f" -a {_fish_offer(_offer(argument))}" if _offer(argument) else "")


def _fish_offer(offer: str) -> str:
    return "'(__regctl_names)'" if offer == "service" else f"'{offer}'"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"
