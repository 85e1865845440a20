"""The example of `make run`: the daemon, the runner and the caller as three processes.

The example runs until Ctrl-C or SIGTERM, and then stops all processes. $PORT is the daemon's port (default 7343).
If the extra `serve` is installed, a fourth process shows the registry in a browser.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from subprocess import Popen

import processes
from processes import HERE, READY_WITHIN_S, end_on_signals, environment, say

REGISTRY = HERE / "registry" / "registry.json"
PORT = os.environ.get("PORT", "7343")
ENVIRONMENT = environment(f"tcp://127.0.0.1:{PORT}")


def running(
    *command: str, ready: Callable[[str], bool], show: Callable[[str], None] = lambda line: say(f"  {line}")
) -> AbstractContextManager[Popen[str]]:
    return processes.running(sys.executable, *command, environment=ENVIRONMENT, ready=ready, show=show)


def registry_with(name: str) -> str:
    """Return the content of the registry file once it has a name. regd writes it up to a second later."""
    until = time.monotonic() + READY_WITHIN_S
    while f'"{name}"' not in (text := REGISTRY.read_text()):
        if time.monotonic() > until:
            raise SystemExit(f"{REGISTRY} does not have {name}")
        time.sleep(0.05)
    return text


@contextlib.contextmanager
def page() -> Iterator[str]:
    """Serve the registry over HTTP during the block. Yield the URL; "" without the extra `serve`."""
    has_extra = [sys.executable, "-c", "import regd.gateways.serve"]
    if subprocess.run(has_extra, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False).returncode:
        yield ""
        return
    lines: list[str] = []
    command = ["-m", "regd.cli.regctl", "serve", "--http", "0", "--dns", "off"]
    with running(*command, ready=lambda line: "listening" in line, show=lines.append):
        yield next(line for line in lines if "listening" in line).split()[-1]


def main() -> None:
    end_on_signals()
    daemon = ["-m", "regd", "--log-level", "warning", "--port", PORT, "--registry", str(REGISTRY)]
    say("1. The daemon listens:")
    with running(*daemon, ready=lambda line: "listening" in line):
        say("2. The runner listens on port 5050, and registers in its start-up hook:")
        with running(str(HERE / "runner.py"), ready=lambda line: "registered" in line) as runner:
            say(f"3. The registration, in {os.path.relpath(REGISTRY)}:")
            say("".join(f"  {line}\n" for line in registry_with("runner").splitlines()).rstrip())
            say("4. The caller finds the runner by its name, and calls it:")
            with running(str(HERE / "caller.py"), ready=lambda line: "got" in line), page() as url:
                say("5. Your turn, in another terminal:")
                say(f"  printf 'resolve runner\\nquit\\n' | nc 127.0.0.1 {PORT}")
                say(f"  printf 'list\\nquit\\n' | nc 127.0.0.1 {PORT}")
                say(f"  kill -9 {runner.pid}   # regd removes its name, and the caller gets an event")
                say(f"  REGD_ADDRESS=127.0.0.1:{PORT} PYTHONPATH=client python3 services/runner.py 5051")
                if url:
                    say(f"  {url}/   # the registry, in a browser")
                say("Ctrl-C ends all of this.")
                signal.pause()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("Ended: caller, runner, daemon. The file stays.")
