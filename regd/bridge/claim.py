"""The claim of a machine's name: a key with a lease, so that no two bridges publish for one machine.

Each commit of a bridge requires that its claim has not changed. So a commit that a frozen member of etcd has
received before a new claim, and carries out after it, has no effect.
"""

import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

from regd.bridge import records
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import EtcdConflict
from regd.bridge.etcd.model import Put, Record
from regd.core.errors import Refused
from regd.protocol.messages import parse_object
from regd.system.processes import start_ticks
from regd_client.protocol import own_host

__all__ = ["Claim", "ClaimRefusal", "host_of"]


class ClaimRefusal(Exception):
    """Another bridge has the machine's name. The message is one line.

    `may_end`: its process has probably ended, and its lease will.
    """

    def __init__(self, message: str, may_end: bool) -> None:
        super().__init__(message)
        self.may_end = may_end


class Claim:
    """The claim of a machine's name by this process.

    Attributes:
        key: in etcd.
    """

    def __init__(self, prefix: str, machine: str) -> None:
        self.key = records.claim_key(prefix, machine)
        self._machine = machine
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **own_host(),
            "started": _started(os.getpid()),
            "id": secrets.token_hex(8),
        }
        self._value = json.dumps(self._own).encode()

    async def make(self, etcd: Etcd, lease: int) -> int:
        """Claim the name, and return the revision of the claim.

        An earlier claim of this process, or of a process of this machine that has ended, is replaced.

        Raises:
            ClaimRefusal: another bridge has it.
            EtcdError: etcd is away, or refuses.
        """
        while True:
            record = await etcd.claim(self.key, self._value, lease)
            if record.lease == lease:
                return record.mod_revision
            holder = _fields(record)
            if not self._is_over(holder):
                self._refuse(holder)
            try:
                return await etcd.commit(
                    [Put(self.key, self._value, lease)], only_if={self.key: record.mod_revision}
                )
            except EtcdConflict:
                continue  # another bridge was quicker, or the old lease has ended

    def _is_over(self, holder: Mapping[str, Any]) -> bool:
        """Return whether the holder is this process, with an earlier lease, or a process here that has ended."""
        if holder.get("id") == self._own["id"]:
            return True
        is_here = all(
            self._own[name] is not None and holder.get(name) == self._own[name]
            for name in ("boot", "pid_namespace")
        )
        pid = holder.get("pid")
        return is_here and type(pid) is int and _started(pid) != holder.get("started")

    def _refuse(self, holder: Mapping[str, Any]) -> None:
        host, pid = holder.get("host", "?"), holder.get("pid", "?")
        raise ClaimRefusal(
            f"a bridge on host {host!s:.64} (process {pid!s:.20}) has the machine name {self._machine!r}; "
            "end it, or choose another name with --machine",
            may_end=holder.get("host") == self._own["host"] and holder.get("boot") != self._own["boot"],
        )


def host_of(record: Record) -> str:
    """Return the host of a bridge, from its claim; "" if no bridge has written the claim."""
    host = _fields(record).get("host", "")
    return host if type(host) is str and len(host) <= 64 else ""


def _fields(record: Record) -> Mapping[str, Any]:
    try:
        return parse_object(record.value)
    except Refused:
        return {}


def _started(pid: int) -> str | None:
    """Return when a process started; None if it has ended, also if its parent has not waited for it yet."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            is_zombie = b"\nState:\tZ" in file.read()
        return None if is_zombie else start_ticks(pid)
    except (OSError, OverflowError):
        return None
