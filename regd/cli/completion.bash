# Completion of regctl for bash, made by `regctl completion bash`.

_regctl_options() {
    case $1 in
@OPTIONS@
    esac
}

_regctl_takes() { # how many values option $2 of command $1 has
    case $1:$2 in
@TAKES@
    *) found= ;;
    esac
}

_regctl_offers() { # what to offer for $2, an option or the number of an argument
    case $1:$2 in
@OFFERS@
    *) found= ;;
    esac
}

_regctl_behind() { # complete the command that begins at word $1
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
    for ((at = 0; at <= COMP_CWORD; at++)); do # join words, which bash splits at = and :
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
                case $word in
@ALIASES@
                esac
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
