"""A network of machines for tests: network namespaces, each with an address, joined by a bridge device."""

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
        kind = FileExistsError if "File exists" in done.stderr else OSError
        raise kind(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """Namespaces 1 to `size`. The bridge device is in the namespace of this process, with the address `host`."""

    def __init__(self, number: int, size: int) -> None:
        self._device = f"regdt{number}"
        self._stem = f"10.213.{number}"
        self.host = f"{self._stem}.1"
        self._size = size

    def open(self) -> None:
        """Create the namespaces and devices.

        Raises:
            FileExistsError: the network is in use.
            OSError: this user may not create it.
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
        """Return what precedes a command to run it in a namespace."""
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
    """Create a network for the block.

    Raises:
        OSError: iproute2 is missing, all networks are in use, or this user may not create one.
    """
    if shutil.which("ip") is None:
        raise OSError("no iproute2 on this machine")
    problem = "all are in use"
    for number in itertools.islice(itertools.count(os.getpid() % _NETWORKS_MAX), _NETWORKS_MAX):
        candidate = Network(number % _NETWORKS_MAX + 1, size)
        try:
            candidate.open()
        except FileExistsError:
            continue
        except OSError as error:
            problem = str(error)
            break
        try:
            yield candidate
            return
        finally:
            candidate.close()
    raise OSError(f"cannot create network namespaces: {problem}")
