"""Programs that run while `make run` or `make cluster` runs, and are then stopped in order."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(HERE.parent), str(HERE.parent / "client")])
READY_WITHIN_S = 30.0
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(text: str) -> None:
    print(text, flush=True)


def environment(address: str) -> dict[str, str]:
    """Return the environment of a program that uses the daemon at an address."""
    return os.environ | {"PYTHONPATH": PATH, "REGD_ADDRESS": address}


@contextlib.contextmanager
def running(
    *command: str,
    environment: Mapping[str, str],
    ready: Callable[[str], bool],
    show: Callable[[str], None],
) -> Iterator[subprocess.Popen[str]]:
    """Run a program during the block, which begins when `ready` accepts a line of its output.

    `show` is called with each line.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only this program, which then stops the others in order
    )
    seen = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            show(line.rstrip())
            if ready(line):
                seen.set()
        seen.set()  # the program has ended

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        if not seen.wait(READY_WITHIN_S) or process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} did not start; its output is above")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        thread.join(1)


def end_on_signals() -> None:
    """Raise KeyboardInterrupt on the first signal that asks this program to end, and ignore any further one."""
    for number in _ENDS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for other in _ENDS:
        signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
    raise KeyboardInterrupt
