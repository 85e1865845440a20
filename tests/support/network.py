"""A network of machines for tests: a namespace for each, with an address of its own, joined by a bridge device."""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator

_COMMAND_S = 30.0
_NETWORKS_MAX = 200


def _run(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """Namespaces 1 to `size`. The bridge device, in this process's own namespace, has the address `host`."""

    def __init__(self, number: int, size: int) -> None:
        self._device = f"regdt{number}"
        self._stem = f"10.213.{number}"
        self.host = f"{self._stem}.1"
        self._size = size

    def open(self) -> None:
        """Make the devices.

        Raises:
            OSError: the network is in use, or this user may not.
        """
        _run("link", "add", self._device, "type", "bridge")
        try:
            _run("address", "add", f"{self.host}/24", "dev", self._device)
            _run("link", "set", self._device, "up")
            for number in range(1, self._size + 1):
                self._add(number)
        except OSError:
            self.close()
            raise

    def _add(self, number: int) -> None:
        name = self.namespace(number)
        _run("netns", "add", name)
        _run("link", "add", self._link(number), "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("link", "set", self._link(number), "master", self._device, "up")
        _run("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        _run("-n", name, "link", "set", "eth0", "up")
        _run("-n", name, "link", "set", "lo", "up")

    def namespace(self, number: int) -> str:
        return f"{self._device}n{number}"

    def _link(self, number: int) -> str:
        return f"{self._device}v{number}"

    def address(self, number: int) -> str:
        return f"{self._stem}.{number + 1}"

    def before(self, number: int) -> list[str]:
        """Return the command line under which a program runs in a namespace."""
        return ["ip", "netns", "exec", self.namespace(number)]

    def cut(self, number: int) -> None:
        """Take a machine's link down."""
        _run("link", "set", self._link(number), "down")

    def heal(self, number: int) -> None:
        _run("link", "set", self._link(number), "up")

    def close(self) -> None:
        for number in range(1, self._size + 1):
            with contextlib.suppress(OSError):
                _run("netns", "delete", self.namespace(number))
            with contextlib.suppress(OSError):
                _run("link", "delete", self._link(number))
        with contextlib.suppress(OSError):
            _run("link", "delete", self._device)


@contextlib.contextmanager
def network(size: int) -> Iterator[Network]:
    """Make a network during the block.

    Raises:
        OSError: there is no iproute2, or this user may not.
    """
    if shutil.which("ip") is None:
        raise OSError("no iproute2 on this machine")
    why: object = ""
    for number in itertools.islice(itertools.count(os.getpid() % _NETWORKS_MAX), _NETWORKS_MAX):
        made = Network(number % _NETWORKS_MAX + 1, size)
        try:
            made.open()
        except OSError as error:
            why = error
            if "File exists" not in str(error):
                break
            continue
        try:
            yield made
            return
        finally:
            made.close()
    raise OSError(f"cannot make network namespaces: {why}")
