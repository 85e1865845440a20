"""Completion in real shells: commands, options, names of services, and the command line after `--`."""

import json
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from regd.cli import completion
from regd.cli.commands import COMMANDS, COMMON, SHELLS
from regd_client.blocking import BlockingConnection
from tests.support.daemon import DaemonProcess, environment
from tests.support.shells import PATIENT, Terminal, need, ran, shell_environment


@pytest.fixture
def names(process: DaemonProcess) -> DaemonProcess:
    with BlockingConnection(process.addresses[0]) as peer:
        for name in ("db", "runner", "run-two"):
            assert peer.ask("register", name=name, port=1)["ok"]
    return process


def bash(lines: Sequence[str], env: dict[str, str]) -> list[list[str]]:
    """Call the completion function as bash does, with the line split into words."""
    code = ["source <(regctl completion bash)"]
    for line in lines:
        words = [piece for word in shlex.split(line) for piece in _cut(word)]
        words += [""] * line.endswith(" ")
        quoted = " ".join(map(shlex.quote, words))
        code.append(f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _regctl; echo ${{COMPREPLY[*]}}")
    return [line.split() for line in ran([need("bash"), "--norc", "-c", "\n".join(code)], env).splitlines()]


def _cut(word: str) -> Iterator[str]:
    piece = ""
    for letter in word:
        if piece and (letter in "=:") != (piece[-1] in "=:"):
            yield piece
            piece = ""
        piece += letter
    yield piece


ZSH = r"""
unsetopt zle_bracketed_paste prompt_sp beep; autoload -Uz compinit; compinit -u -D
source <(regctl completion zsh)
pressed() { zle list-choices; print -n 'all ''seen' }
zle -N pressed; bindkey '^I' pressed
compadd() { # the shell's own, which also records the candidates
    local -a fits
    if [[ " ${@[1,(i)(-|--)]} " != *' -'[^-]#[OAD]' '* ]]; then
        builtin compadd -A fits "$@"
        (( $#fits )) && print -l -- $fits >> ~/fits
    fi
    builtin compadd "$@"
}
setopt extended_glob; PS1='rea''dy> '
"""


def zsh(lines: Sequence[str], env: dict[str, str]) -> list[list[str]]:
    """Press TAB in a terminal, and return the candidates of zsh."""
    fits, settings = Path(env["HOME"], "fits"), Path(env["HOME"], "settings")
    settings.write_text(ZSH)
    found = []
    with Terminal([need("zsh"), "-f", "-i"], env) as terminal:
        terminal.press("source ~/settings\n")
        terminal.read_until("ready> ")
        for line in lines:
            fits.write_text("")
            terminal.press(f"\x15{line}\t")
            terminal.read_until("all seen")
            found.append(sorted(set(fits.read_text().split())))
    return found


def fish(lines: Sequence[str], env: dict[str, str]) -> list[list[str]]:
    asked = (f"echo (complete -C {shlex.quote(line)} | string replace -r '\\t.*' '')" for line in lines)
    code = ["regctl completion fish | source", *asked]
    return [line.split() for line in ran([need("fish"), "--no-config", "-c", "\n".join(code)], env).splitlines()]


def completed(shell: str, env: dict[str, str], *lines: str) -> list[list[str]]:
    """Return the candidates that a shell offers at the end of each line."""
    found = ALL[shell](lines, env)
    assert len(found) == len(lines)
    return found


ALL = {"bash": bash, "zsh": zsh, "fish": fish}
COMMON_OPTIONS = ["--address", "--help", "--json"]
RUN_OPTIONS = [
    "--instance", "--meta", "--port", "--priority", "--ready-command", "--ready-http", "--socket", "--timeout", "--wait",
]  # fmt: skip
CASES = {
    "regctl re": ["register", "resolve"],
    "regctl nothing-like-that": [],
    "regctl --js": ["--json"],
    "regctl --json --": ["--address", "--help", "--version"],
    "regctl resolve --": ["--all", "--instance", "--meta", *COMMON_OPTIONS],
    "regctl list --meta a=b --json --": ["--address", "--help", "--meta"],
    "regctl resolve ": ["db", "run-two", "runner"],
    "regctl resolve ru": ["run-two", "runner"],
    "regctl resolve nobody": [],
    "regctl resolve --instance ": [],
    "regctl list --meta zone=a d": ["db"],
    "regctl why --json d": ["db"],
    "regctl list --meta ": [],
    "regctl register ": [],
    "regctl wait db ru": ["run-two", "runner"],
    "regctl completion ": ["bash", "fish", "zsh"],
    "regctl help re": ["register", "resolve"],
    "regctl manual ": ["regctl", "regd"],
    "regctl run shop --wait db ru": ["run-two", "runner"],
    "regctl run shop --wait db runner --": [*RUN_OPTIONS, *COMMON_OPTIONS],
    "regctl run ru": [],
    "regctl ls d": ["db"],
    "regctl ls --": ["--meta", *COMMON_OPTIONS],
    "regctl rm ru": ["run-two", "runner"],
    "regctl drain d": ["db"],
    "regctl update db --state ": ["draining", "ready", "starting"],
    "regctl register db 1 --state r": ["ready"],
    "regctl env --format ": ["docker", "shell"],
    "regctl env --format shell d": ["db"],
    "regctl stats --": ["--limits", *COMMON_OPTIONS],
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_names(shell: str, names: DaemonProcess, tmp_path: Path) -> None:
    env = shell_environment(names.addresses[0], tmp_path)
    found = completed(shell, env, *CASES)
    for (line, wanted), offered in zip(CASES.items(), found, strict=True):
        assert sorted(offered) == sorted(wanted), line


@pytest.mark.sample(3)
@pytest.mark.parametrize("shell", SHELLS)
def test_value_after_an_equals_sign(shell: str, names: DaemonProcess, tmp_path: Path) -> None:
    env = shell_environment(names.addresses[0], tmp_path)
    [[found]] = completed(shell, env, "regctl run shop --wait=d")
    assert found.removeprefix("--wait=") == "db"  # fish returns the whole word


@pytest.mark.sample(3)
@pytest.mark.parametrize("shell", SHELLS)
def test_names_come_from_the_daemon_of_the_address_option(
    shell: str, names: DaemonProcess, tmp_path: Path
) -> None:
    nowhere = f"unix://{tmp_path}/none"
    env = shell_environment(nowhere, tmp_path)
    lines = [f"regctl --address {names.addresses[0]} why d", f"regctl why --address={names.addresses[0]} d"]
    assert completed(shell, env, *lines, "regctl why d") == [["db"], ["db"], []]
    env = shell_environment(names.addresses[0], tmp_path)
    assert completed(shell, env, f"regctl --address {nowhere} why d") == [[]]


@pytest.mark.sample(3)
@pytest.mark.parametrize("shell", SHELLS)
def test_without_a_daemon_no_names_and_no_messages(shell: str, tmp_path: Path) -> None:
    assert completed(
        shell, shell_environment(f"unix://{tmp_path}/none", tmp_path, patient=False), "regctl resolve "
    ) == [[]]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = shell_environment(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path, patient=False)
        assert completed(shell, env, "regctl resolve ") == [[]]


@pytest.mark.sample(3)
@pytest.mark.parametrize("shell", SHELLS)
def test_command_of_run_is_completed_by_the_shell(shell: str, names: DaemonProcess, tmp_path: Path) -> None:
    env = shell_environment(names.addresses[0], tmp_path)
    (tmp_path / "unlike-a-name.txt").touch()
    one, other, options, files = completed(
        shell, env, "regctl run db -- cksu", "regctl run --wait db runner --meta a=b web -- cksu",
        "regctl run db -- cksum --po", "regctl run db -- cksum unl",
    )  # fmt: skip
    assert "cksum" in one
    assert "cksum" in other
    assert "--port" not in options
    assert (
        files == ["unlike-a-name.txt"] or shell == "bash"
    )  # readline completes files, only in an interactive bash


def test_completion_in_an_interactive_bash(names: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "unlike-a-name.txt").touch()
    env = shell_environment(names.addresses[0], tmp_path)
    with Terminal([need("bash"), "--norc", "--noprofile", "-i"], env) as terminal:
        terminal.press("source <(regctl completion bash); PS1='rea''dy> '\n")
        terminal.read_until("ready> ")
        for typed, shown in (
            ("regctl deregi\t", "regctl deregister "),
            ("regctl resolve runn\t", "regctl resolve runner "),
            ("regctl run x --wait=d\t", "regctl run x --wait=db "),
            (f"regctl why --address {names.addresses[0]} d\t", "db "),
            ("regctl run x -- cksum unl\t", "cksum unlike-a-name.txt "),
        ):
            terminal.press(f"\x15{typed}")
            terminal.read_until(shown)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_candidate_has_a_description(shell: str) -> None:
    text = completion.script(shell)
    for name, command in COMMANDS.items():
        assert name in text
        assert command.doc.replace("'", r"'\''" if shell == "zsh" else r"\'") in text
    for parameter in (*COMMON, *(parameter for command in COMMANDS.values() for parameter in command.parameters)):
        if parameter.is_option:
            assert f"{parameter.name}" in text or f"-l {parameter.name[2:]}" in text
            said = parameter.doc.split(":")[0].split(";")[0]
            assert said.replace("'", r"'\''" if shell == "zsh" else r"\'") in text


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_accept_the_scripts(shell: str) -> None:
    done = subprocess.run(
        [need(shell), "-n"],
        input=completion.script(shell),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# `regctl names`


def regctl_names(address: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PATIENT.format(python=""), "names", *arguments],
        env=environment(REGD_ADDRESS=address), capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_names(names: DaemonProcess) -> None:
    with BlockingConnection(names.addresses[0]) as peer:
        for number in range(1_500):
            peer.ask("register", name="many", instance=str(number), port=1)
    assert regctl_names(names.addresses[0]) == (0, "db\nmany\nrun-two\nrunner\n", "")
    assert regctl_names(names.addresses[0], "run*") == (0, "run-two\nrunner\n", "")
    assert regctl_names(names.addresses[0], "RUN*") == (0, "", "")
    assert json.loads(regctl_names(names.addresses[0], "d*", "--json")[1]) == {"ok": True, "names": ["db"]}


def test_names_of_an_impostor_are_ignored(tmp_path: Path) -> None:
    """Names from an impostor must not appear in a command line."""
    good = {"name": "good", "instance": "", "host": "h", "port": 1, "meta": {}, "state": "ready", "rev": 1}
    page = {"ok": True, "epoch": "e", "rev": 1, "instances": [good]}
    evil = [{**good, "name": name} for name in ("$(evil)", "a b", "-rf", "a\nb", 7, "")]
    cases: list[tuple[dict[str, object] | str, tuple[int, str, str]]] = [
        (page, (0, "good\n", "")),
        *(({**page, "instances": [good, instance]}, (3, "", "")) for instance in evil),
        ({"ok": True}, (3, "", "")),
        ({"ok": True, "instances": 7}, (3, "", "")),
        ("HTTP/1.1 400 Bad Request", (3, "", "")),
    ]
    for said, wanted in cases:
        with socket.create_server(("127.0.0.1", 0)) as server:
            line = json.dumps(said) if isinstance(said, dict) else said

            def answer(server: socket.socket = server, line: str = line) -> None:
                accepted, _ = server.accept()
                with accepted:
                    accepted.recv(4_096)
                    accepted.sendall(line.encode() + b"\n")

            answering = threading.Thread(target=answer)
            answering.start()
            assert regctl_names(f"127.0.0.1:{server.getsockname()[1]}", "*") == wanted, said
            answering.join()
