"""A registry in memory, for unit tests: no daemon, no socket, no thread, no file.

    with regd_client.testing.fake() as registry:
        registry.register("db", 5432)
        found = await regd_client.resolve("db")

While it is in place, every client of this process comes to it: `Client`, the functions, `serving`, `listen`, and
the blocking face. Registrations, watches and mirrors, and what they do when the daemon goes away, are the real
client's. It is held to the real daemon by the same tests.

What is different: nothing is probed, and who is `ready` counts as accepting connections. No process is watched,
and any number is taken for a living one's. No time passes by itself: leases, and what waits to be claimed, end
when the test says so, and `progress` is not told; `wait` alone takes the time that it says. Nothing is refused as
`busy`, `denied` or `storage_failed`, and there are only some of the `stats` and limits. `near` may name others.
`help`, and what is no request, are for a daemon alone. Another process has none of it, a forked one a copy, and
nothing outlasts it.
"""

from regd_client.testing.fake import FakeRegistry, fake, fixture

__all__ = ["FakeRegistry", "fake", "fixture"]
