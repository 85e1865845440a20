# Completion of regctl for fish, made by `regctl completion fish`.

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
                switch $token
@ALIASES@
                end
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
    set -l place (__regctl_place)
    test "$place[3]" = $option; and return 1 # its value is still to come
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
