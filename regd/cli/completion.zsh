#compdef regctl
# Completion of regctl for zsh, made by `regctl completion zsh`.

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
