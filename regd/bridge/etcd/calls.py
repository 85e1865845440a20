"""Calls with a deadline, at one member after another, and with a new token when the old one has expired."""

import asyncio
import time
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from regd.bridge.etcd.backoff import Backoff
from regd.bridge.etcd.errors import DeadlineExceeded, EtcdError, EtcdRefused, EtcdUnavailable, TokenExpired
from regd.bridge.etcd.member import Member, Metadata
from regd.bridge.etcd.members import Members
from regd.bridge.etcd.methods import AUTHENTICATE, Method
from regd.bridge.etcd.model import User

__all__ = ["Calls", "metadata"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

_REPEAT_PAUSE_S_MAX = 0.5
_DEADLINE_S_MAX = 16.0


def metadata(token: str) -> Metadata:
    """Return the metadata of a call or a stream: the token, and that a member without a leader refuses it."""
    return (("hasleader", "true"), *((("token", token),) if token else ()))


class Calls:
    """Calls methods of a cluster.

    Args:
        members: of the cluster.
        user: to authenticate as; None for no user, or one that is named by the client's certificate.
        deadline_s: for a call at one member. It is doubled after each call that took longer, up to 16 s.

    Attributes:
        repeat_s: how long a call is repeated: longer than the election of a leader takes.
    """

    def __init__(self, members: Members, user: User | None, deadline_s: float) -> None:
        self.members = members
        self.repeat_s = 5.0
        self._user = user
        self._token = ""
        self._authenticating = asyncio.Lock()
        self._deadline_s = self._first_deadline_s = deadline_s

    async def call(self, method: Method[Q, R], request: Q, repeatable: bool) -> R:
        """Call a method and return its response.

        Args:
            repeatable: it may be called several times, for example because it only reads. Otherwise it is
                repeated only if no attempt can have had an effect.

        Raises:
            EtcdUnavailable: no member answered in time.
            EtcdError: etcd answered with an error.
        """
        backoff = Backoff(_REPEAT_PAUSE_S_MAX)
        end = time.monotonic() + self.repeat_s
        while True:
            try:
                return await self._call_member(method, request)
            except EtcdUnavailable as error:
                if time.monotonic() >= end or not (repeatable or not error.may_have_effect):
                    raise
            await backoff.pause()

    async def _call_member(self, method: Method[Q, R], request: Q) -> R:
        """Call once, and once more with a new token if etcd does not accept the old one."""
        async with self.members.use() as member:
            token = await self.token(member)
            try:
                return await self._ask(member, method, request, token)
            except TokenExpired:
                if not self._user:
                    raise
            self.forget_token(token)
            return await self._ask(member, method, request, await self.token(member))

    async def _ask(self, member: Member, method: Method[Q, R], request: Q, token: str) -> R:
        deadline_s = self._deadline_s
        try:
            response = await member.ask(method, request, metadata(token), deadline_s)
        except EtcdUnavailable as error:
            if isinstance(error, DeadlineExceeded):
                self._deadline_s = min(2 * deadline_s, _DEADLINE_S_MAX)
            raise
        except EtcdError:
            self.members.answered()
            raise
        self._deadline_s = self._first_deadline_s
        self.members.answered()
        return response

    async def token(self, member: Member) -> str:
        """Return the token for calls and streams; "" without a user.

        Raises:
            EtcdRefused: the user or the password is wrong, or the password file cannot be read.
        """
        async with self._authenticating:
            if self._user is not None and not self._token:
                self._token = await self._authenticate(member, self._user)
        return self._token

    def forget_token(self, token: str) -> None:
        """Note that etcd did not accept a token: the next call authenticates again, if no other has done so."""
        if self._token == token:
            self._token = ""

    async def _authenticate(self, member: Member, user: User) -> str:
        request = AUTHENTICATE.request(name=user.name, password=_read_password(user.password_file))
        try:
            response = await self._ask(member, AUTHENTICATE, request, "")
        except EtcdRefused as error:
            if "authentication is not enabled" in str(error):
                return ""  # as etcdctl does, so that authentication can be enabled later
            raise EtcdRefused(f"{error} (user {user.name!r})") from None
        return response.token


def _read_password(file: Path) -> str:
    """Return the first line of a file."""
    try:
        return file.read_text().partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise EtcdRefused(f"cannot read {file}: {why}") from None
