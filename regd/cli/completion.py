"""Scripts that make bash, zsh and fish complete the command lines of regctl, from the one table.

Each script knows the commands and options by itself; it asks `regctl names` for the names of services, and has no
offer where free text stands. Behind the `--` of a command that runs another, the shell goes on as anywhere.
Must not know what a command does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from regd.cli.commands import COMMANDS, COMMON, Argument

_ALONE = {"--help": "show this help, and do nothing else", "--version": "show the version, and do nothing else"}
_HELP = {"--help": _ALONE["--help"]}
_RUNNING = [name for name, command in COMMANDS.items() if command.runs]


def script(shell: str) -> str:
    """Return the script for `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def values(argument: Argument) -> str:
    """Return how many words belong to it: `none`, `one`, or `many`, up to the next option."""
    if argument.how.get("action") == "store_true":
        return "none"
    return "many" if argument.how.get("nargs") in ("+", "*") else "one"


def again(argument: Argument) -> bool:
    """Return whether an option may be given more than once."""
    return argument.how.get("action") in ("append", "extend")


def _options(command: str) -> list[Argument]:
    return [*(each for each in COMMANDS[command].arguments if each.is_option), *COMMON]


def _offer(argument: Argument) -> str:
    """Return what may stand there: words, `service`, or nothing."""
    if argument.takes == "command":
        return " ".join(COMMANDS)
    return argument.takes or " ".join(argument.how.get("choices", ()))


def _places(command: str) -> Iterator[tuple[str, str]]:
    """Yield an option, or the number of an argument, `*` for any; and what is offered there."""
    number = 0
    for argument in COMMANDS[command].arguments:
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
        for each in command.arguments
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
        _BASH.replace("@OPTIONS@", "\n".join(options))
        .replace("@TAKES@", "\n".join(takes))
        .replace("@OFFERS@", "\n".join(offers))
        .replace("@COMMANDS@", " ".join(COMMANDS))
        .replace("@RUNNING@", "|".join(_RUNNING))
    )


def _bash_options(arguments: Iterable[Argument], more: Iterable[str]) -> str:
    """Those that may be given again end in `*`."""
    return " ".join([*(each.name + "*" * again(each) for each in arguments), *more])


_BASH = r"""# Completion of regctl for bash, as `regctl completion bash` makes it.

_regctl_options() {
    case $1 in
@OPTIONS@
    esac
}

_regctl_takes() { # how many values an option has: $1 is the command, $2 the option
    case $1:$2 in
@TAKES@
    *) found= ;;
    esac
}

_regctl_offers() { # what may stand there: $2 is an option, or the number of an argument
    case $1:$2 in
@OFFERS@
    *) found= ;;
    esac
}

_regctl_behind() { # a command line of its own begins at word $1
    if declare -F _command_offset >/dev/null; then
        _command_offset "$1"
    elif ((COMP_CWORD == $1)); then
        COMPREPLY=($(compgen -c -- "${COMP_WORDS[COMP_CWORD]}"))
    else
        compopt -o default 2>/dev/null
    fi
}

_regctl() {
    local IFS=$' \t\n' words=() word joins= at found
    for ((at = 0; at <= COMP_CWORD; at++)); do # bash has cut them at = and :
        word=${COMP_WORDS[at]}
        if ((${#words[@]})) && [[ $joins || $word =~ ^[=:]+$ ]]; then
            words[${#words[@]}-1]+=$word
        else
            words+=("$word")
        fi
        joins=
        [[ $word =~ ^[=:]+$ ]] && joins=yes
    done
    local current=${words[${#words[@]}-1]} command= address= given=' ' option= pending= count=0 only_words=
    COMPREPLY=()
    for ((at = 1; at < ${#words[@]} - 1; at++)); do
        word=${words[at]}
        if [[ $pending == one ]]; then
            [[ $option == --address ]] && address=$word
            pending=
        elif [[ ! $only_words && $word == -- ]]; then
            case $command in
            @RUNNING@)
                for ((at = 1; at < COMP_CWORD; at++)); do
                    [[ ${COMP_WORDS[at]} == -- ]] && _regctl_behind $((at + 1)) && return
                done
                ;;
            esac
            only_words=yes pending=
        elif [[ ! $only_words && $word == -* ]]; then
            option=${word%%=*} pending=
            given+="$option "
            if [[ $word != *=* ]]; then
                _regctl_takes "$command" "$option"
                pending=$found
            elif [[ $option == --address ]]; then
                address=${word#*=}
            fi
        elif [[ ! $pending ]]; then
            if [[ $command ]]; then
                count=$((count + 1))
            else
                command=$word
            fi
        fi
    done

    if [[ ! $only_words && $pending != one && $current == --*=* ]]; then
        option=${current%%=*} pending=one current=${current#*=}
    elif [[ ! $only_words && $pending != one && $current == -* ]]; then
        _regctl_options "$command"
        for word in $found; do
            [[ $word != *'*' && $given == *" $word "* ]] && continue
            word=${word%'*'}
            [[ $word == "$current"* ]] && COMPREPLY+=("$word")
        done
        return
    fi
    if [[ $pending ]]; then
        _regctl_offers "$command" "$option"
    elif [[ $command ]]; then
        _regctl_offers "$command" "$count"
    else
        found='@COMMANDS@'
    fi
    if [[ $found == service ]]; then
        [[ $address ]] && local -x REGD_ADDRESS=$address
        found=$({ command regctl names "$current*" </dev/null; } 2>/dev/null)
    fi
    for word in $found; do
        [[ $word == "$current"* ]] && COMPREPLY+=("$word")
    done
}

complete -F _regctl regctl
"""

# zsh


def _zsh() -> str:
    common = "\n".join(_zsh_lines([*map(_zsh_option, COMMON), *(_zsh_alone(*each) for each in _ALONE.items())]))
    return (
        _ZSH.replace("@COMMON@", common)
        .replace("@COMMANDS@", "\n".join(f"        {_quoted(_zsh_described(name))}" for name in COMMANDS))
        .replace("@EACH@", "\n".join(map(_zsh_command, COMMANDS)))
        .replace("@MANY@", "|".join({option for _, option, many in _several() if many == "many"}))
        .replace("@RUNNING@", "|".join(_RUNNING))
    )


def _zsh_command(name: str) -> str:
    arguments = COMMANDS[name].arguments
    specs = [
        *map(_zsh_option, _options(name)),
        *(_zsh_alone(*each) for each in _HELP.items()),
        *(_zsh_word(each) for each in arguments if not each.is_option),
    ]
    lines = "\n".join("    " + line for line in _zsh_lines(specs))
    return f"    {name})\n        _arguments -S \\\n{lines}\n        ;;"


def _zsh_lines(specs: list[str]) -> list[str]:
    quoted = [f"        {_quoted(each)}" for each in specs]
    return [each + " \\" for each in quoted[:-1]] + quoted[-1:]


def _zsh_described(name: str) -> str:
    return f"{name}:{COMMANDS[name].doc}"


def _zsh_option(argument: Argument) -> str:
    shown = f"{'*' if again(argument) else ''}{argument.name}"
    if values(argument) == "none":
        return f"{shown}[{_zsh_text(argument.doc)}]"
    return f"{shown}=[{_zsh_text(argument.doc)}]:{argument.how['metavar']}:{_zsh_offer(argument)}"


def _zsh_alone(name: str, doc: str) -> str:
    return f"(- *){name}[{doc}]"


def _zsh_word(argument: Argument) -> str:
    colons = {"?": "::"}.get(str(argument.how.get("nargs")), ":")
    place = "*" if values(argument) == "many" else ""
    return f"{place}{colons}{argument.how['metavar']}:{_zsh_offer(argument)}"


def _zsh_offer(argument: Argument) -> str:
    offer = _offer(argument)
    if argument.takes == "command":
        return "_regctl_commands"
    if argument.takes == "service":
        return "_regctl_names"
    return f"({offer})" if offer else " "


def _zsh_text(text: str) -> str:
    return text.replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


_ZSH = r"""#compdef regctl
# Completion of regctl for zsh, as `regctl completion zsh` makes it.

_regctl_commands() {
    local -a commands=(
@COMMANDS@
    )
    _describe -t commands command commands
}

_regctl_names() {
    local -a names
    [[ -n $regctl_address ]] && local -x REGD_ADDRESS=$regctl_address
    names=(${(f)"$({ command regctl names "$PREFIX*" </dev/null } 2>/dev/null)"})
    (( $#names )) && compadd -a names
}

_regctl() {
    local curcontext=$curcontext state line regctl_address at
    local -A opt_args
    for (( at = 2; at < CURRENT; at++ )); do
        case $words[at] in
        --) break ;;
        --address) (( at + 1 < CURRENT )) && regctl_address=${(Q)words[at+1]} ;;
        --address=*) regctl_address=${(Q)words[at]#--address=} ;;
        @MANY@) # how many values does not matter here
            while (( at + 2 <= CURRENT )) && [[ $words[at+1] != -* && $words[at+2] != -* ]]; do
                words[at+1]=()
                (( CURRENT-- ))
            done
            ;;
        esac
    done
    if (( at < CURRENT )) && [[ -n ${(M)words[2,at-1]:#(@RUNNING@)} ]]; then # a command line of its own
        shift at words
        (( CURRENT -= at ))
        _normal
        return
    fi
    _arguments -C -S \
@COMMON@ \
        '(-)1:command:_regctl_commands' \
        '(-)*::argument:->arguments' && return
    [[ $state == arguments ]] || return 1
    case $words[1] in
@EACH@
    *) return 1 ;;
    esac
}

if [[ $funcstack[1] == _regctl ]]; then
    _regctl "$@"
else
    compdef _regctl regctl
fi
"""

# fish


def _fish() -> str:
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
        _FISH.replace("@TAKES@", "\n".join(takes))
        .replace("@COMPLETE@", "\n".join(lines))
        .replace("@RUNNING@", " ".join(_RUNNING))
    )


def _is_many(command: str, option: str) -> bool:
    return (command, option, "many") in _several()


def _quoted_star(place: str) -> str:
    return '"*"' if place == "*" else place


def _fish_option(condition: str, argument: Argument) -> str:
    once = "" if again(argument) else f"; and not __regctl_gave {argument.name}"
    made = f"complete -c regctl -n '{condition}{once}' -l {argument.name[2:]} -d {_fish_text(argument.doc)}"
    if values(argument) == "none":
        return made
    return made + " -x" + (f" -a {_fish_offer(_offer(argument))}" if _offer(argument) else "")


def _fish_offer(offer: str) -> str:
    return "'(__regctl_names)'" if offer == "service" else f"'{offer}'"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"


_FISH = r"""# Completion of regctl for fish, as `regctl completion fish` makes it.

function __regctl_takes --argument-names command option -d 'How many values an option has'
    switch "$command:$option"
@TAKES@
    end
end

# Three lines: the command, the address, and what the cursor is at: an option with values, the number of an
# argument, or `behind` the -- of a command line of its own, and at which word.
function __regctl_place
    set -l command
    set -l address
    set -l option
    set -l pending
    set -l count 0
    set -l only_words
    set -l at 1
    set -l tokens (commandline -opc)
    for token in $tokens[2..]
        set at (math $at + 1)
        if test "$pending" = one
            test "$option" = --address; and set address $token
            set pending
        else if test -z "$only_words" -a x$token = x--
            if contains -- "$command" @RUNNING@
                printf '%s\n' $command "$address" "behind $at"
                return
            end
            set only_words yes
            set pending
        else if test -z "$only_words"; and string match -q -- '-*' $token
            set -l parts (string split -m 1 = -- $token)
            set option $parts[1]
            set pending
            if set -q parts[2]
                test $option = --address; and set address $parts[2]
            else
                set pending (__regctl_takes "$command" $option)
            end
        else if test -z "$pending"
            if test -n "$command"
                set count (math $count + 1)
            else
                set command $token
            end
        end
    end
    test -n "$pending"; and set count $option
    printf '%s\n' "$command" "$address" $count
end

function __regctl_at_start
    set -l place (__regctl_place)
    test -z "$place[1]"; and test "$place[3]" = 0
end

function __regctl_in --argument-names command
    set -l place (__regctl_place)
    test "$place[1]" = $command; and not string match -q 'behind *' -- $place[3]
end

function __regctl_at --argument-names command where
    set -l place (__regctl_place)
    test "$place[1]" = $command; or return
    if test "$where" = '*'
        string match -qr '^\d+$' -- $place[3]
    else
        test "$place[3]" = $where
    end
end

function __regctl_gave --argument-names option
    string match -q -- "$option" (string replace -r '=.*' '' -- (commandline -opc))
end

function __regctl_names
    set -l place (__regctl_place)
    test -n "$place[2]"; and set -lx REGD_ADDRESS $place[2]
    set -l current (string replace -r '^--[a-z-]+=' '' -- (commandline -ct))
    command regctl names "$current*" </dev/null 2>/dev/null
end

function __regctl_behind
    set -l place (__regctl_place)
    string match -q 'behind *' -- $place[3]
end

function __regctl_others
    set -l place (__regctl_place)
    set -l at (string replace 'behind ' '' -- $place[3])
    set -l tokens (commandline -opc) (commandline -ct)
    complete -C (string join ' ' -- (string escape -- $tokens[(math $at + 1)..-2]) $tokens[-1])
end

complete -c regctl -f
complete -c regctl -n __regctl_behind -a '(__regctl_others)'
@COMPLETE@
"""
