"""The table of all limits: value, reason, effect beyond it, error code and memory.

`hello` and `stats` show the limits in use. A test compares the table in DESIGN.md with this one.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self


def _row(value: float, why: str, beyond: str, error: str = "", *, each_bytes: int = 0) -> Any:
    """Return a row. `each_bytes` is the most memory that one unit takes; 0 if another row counts it."""
    return field(default=value, metadata={"why": why, "beyond": beyond, "error": error, "each_bytes": each_bytes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits in use. A name ends with its unit; without a unit, the limit is a number of things."""

    line_bytes_max: int = _row(
        65_536, "16 times the largest meta; Redis takes the same", "line skipped to its end", "too_large"
    )
    bare_line_bytes_max: int = _row(512, "blanks included; people type less", "closed", "bad_request")
    line_idle_s_max: float = _row(
        20.0, "people and programs send whole lines", "error line, connection closed", "timeout"
    )
    id_chars_max: int = _row(64, "room for a UUID with a prefix", "request refused", "bad_request")
    connections_max: int = _row(
        10_240,
        "10,000 services and some terminals; fewer where fewer files may be open",
        "closed",
        "busy",
        each_bytes=6_144,
    )
    readonly_connections_max: int = _row(
        2_560,
        "connections of users who may only read; the rest of `connections_max` is for writers",
        "closed",
        "busy",
    )
    requests_in_flight_max: int = _row(
        64, "per connection; enough to fill a commit", "connection is not read until replies are out"
    )
    writes_waiting_max: int = _row(
        16_384, "of all connections; some 256 connections at their own limit", "request refused", "busy"
    )
    pending_bytes_max: int = _row(
        134_217_728,
        "requests that wait for the disk or an instance, and watches",
        "request refused",
        "busy",
        each_bytes=1,
    )
    readonly_pending_bytes_max: int = _row(
        16_777_216, "the same, of users who may only read", "request refused", "busy", each_bytes=1
    )
    readonly_input_bytes_total_max: int = _row(
        16_777_216,
        "`input_bytes_total_max` of users who may only read",
        "the largest are closed",
        "busy",
        each_bytes=1,
    )
    readonly_output_bytes_total_max: int = _row(
        16_777_216, "`output_bytes_total_max` of users who may only read", "the largest are dropped", each_bytes=1
    )
    readonly_watches_total_max: int = _row(
        16_384, "`watches_total_max` of users who may only read", "request refused", "busy"
    )
    readonly_parked_total_max: int = _row(
        4_096, "`parked_total_max` of users who may only read", "request refused", "busy"
    )
    readonly_probes_max: int = _row(64, "`probes_max` for users who may only read", "the rest waits")
    readonly_round_robin_filters_max: int = _row(
        1_024, "`round_robin_filters_max` of users who may only read", "round robin starts again", each_bytes=512
    )
    readonly_slow_replies_max: int = _row(
        8,
        "replies that take several time slices, of users who may only read",
        "the rest waits",
        each_bytes=1_600_000,
    )
    output_bytes_max: int = _row(
        16_384, "unsent, per connection; the kernel holds more", "connection is not read until all is sent"
    )
    output_bytes_total_max: int = _row(
        67_108_864, "unsent, of connections beyond output_bytes_max", "the largest are dropped", each_bytes=1
    )
    input_bytes_total_max: int = _row(
        67_108_864, "unfinished or unanswered lines in all", "the largest are closed", "busy", each_bytes=1
    )
    reply_instances_max: int = _row(1_000, "a page that is quick to encode and to read", "`next` or `more`")
    reply_bytes_max: int = _row(1_048_576, "a reply is one write", "`next` or `more`")
    list_scan_max: int = _row(2_000, "entries looked at for one page; keeps the event loop free", "`next`")
    search_step_max: int = _row(
        2_000, "instances looked at in one loop iteration", "the search continues in a later one"
    )
    round_robin_filters_max: int = _row(
        4_096,
        "round-robin positions, one for each `meta` filter of a name",
        "round robin starts again",
        each_bytes=512,
    )
    near_candidates_max: int = _row(128, "names compared with a misspelled one", "the rest is not compared")
    near_names_max: int = _row(3, "more would not help", "the rest is not named")
    departures_max: int = _row(
        1_024,
        "names whose departures are kept, for `last` and `why`",
        "the oldest is forgotten",
        each_bytes=3_072,
    )
    departures_kept: int = _row(8, "departures of each name, for `why`", "the oldest is forgotten")
    held_max: int = _row(10_000, "registrations per connection, with `hold`", "request refused", "busy")
    process_held_max: int = _row(
        10_000, "registrations per process, with `pid`; its end changes all of them", "request refused", "busy"
    )
    holders_max: int = _row(256, "of one registration; the workers of one server", "request refused", "busy")
    processes_max: int = _row(
        8_192, "`pid`s watched; each is an open file", "request refused", "busy", each_bytes=2_048
    )
    history_changes_max: int = _row(
        16_384, "changes that a watch may miss and still resume", "`reset` and a snapshot"
    )
    history_bytes_max: int = _row(67_108_864, "the same, in bytes", "`reset` and a snapshot", each_bytes=1)
    journal_segment_bytes_max: int = _row(
        8_388_608, "replayed in two seconds at most", "the next checkpoint begins another segment"
    )
    journal_bytes_max: int = _row(
        67_108_864, "on disk; `--history-mib` changes it", "the oldest segment is deleted"
    )
    checkpoint_interval_s: float = _row(1.0, "between two checkpoints of the registry file", "")
    watches_max: int = _row(256, "per connection", "request refused", "busy")
    watches_total_max: int = _row(65_536, "in all", "request refused", "busy")
    parked_max: int = _row(256, "`resolve` with `wait`, per connection", "request refused", "busy")
    parked_total_max: int = _row(16_384, "the same, in all", "request refused", "busy")
    wait_s_max: float = _row(3_600.0, "an hour", "request refused", "bad_argument")
    probes_max: int = _row(256, "addresses probed at a time", "the rest waits")
    probed_instances_max: int = _row(64, "of one name for one `wait`, at a time", "the rest waits")
    probe_s_max: float = _row(1.0, "for one attempt to connect", "counts as no answer")
    progress_s: float = _row(30.0, "between two `progress` events", "")
    registrations_max: int = _row(200_000, "ten times what a large machine runs", "request refused", "busy")
    registry_bytes_max: int = _row(
        536_870_912, "as kept in memory, by estimate", "request refused", "busy", each_bytes=1
    )
    name_chars_max: int = _row(253, "as in DNS", "request refused", "bad_argument")
    label_chars_max: int = _row(63, "as in DNS", "request refused", "bad_argument")
    instance_chars_max: int = _row(63, "as one label", "request refused", "bad_argument")
    host_chars_max: int = _row(253, "as in DNS", "request refused", "bad_argument")
    meta_keys_max: int = _row(64, "labels, not a database", "request refused", "bad_argument")
    meta_bytes_max: int = _row(4_096, "keys and values, as UTF-8", "request refused", "bad_argument")
    ttl_s_min: float = _row(1.0, "more frequent renewals would be a load", "request refused", "bad_argument")
    ttl_s_max: float = _row(86_400.0, "a day", "request refused", "bad_argument")
    close_linger_s_max: float = _row(
        1.0, "input discarded so that a reset does not destroy the last reply", "connection dropped"
    )

    def for_readonly_users(self) -> Self:
        """Return the limits of users who may only read: `readonly_X` replaces `X`."""
        names = {row.name for row in fields(self)}
        own = {name: getattr(self, f"readonly_{name}") for name in names if f"readonly_{name}" in names}
        return replace(self, **own)

    @property
    def memory_bytes(self) -> int:
        """The most memory that clients can make regd use: the sum over the table."""
        return sum(int(getattr(self, row.name)) * row.metadata["each_bytes"] for row in fields(self))

    def values(self) -> dict[str, float]:
        """Return the limits by name, as `hello` and `stats` show them."""
        return {row.name: getattr(self, row.name) for row in fields(self)}


DEFAULT = Limits()
