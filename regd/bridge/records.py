"""Converts an instance to a key and a value in etcd, and these to a registration on another machine.

Pure functions. Anyone may have written a key or a value, so they are checked like a request from a stranger.
"""

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from regd.core import model
from regd.core.errors import Invalid, Refused
from regd.core.limits import DEFAULT
from regd.protocol.messages import parse_object

__all__ = [
    "BRIDGE",
    "MACHINE",
    "Place",
    "arrival",
    "arrival_key",
    "check_advertise",
    "check_machine",
    "check_prefix",
    "claim_key",
    "is_arrival",
    "is_loopback",
    "key_of",
    "machine_prefix",
    "place_of",
    "published",
    "reason_not_to_publish",
    "value_of",
]

MACHINE = model.MACHINE
PUBLISH = "regd.publish"  # the label with which an instance is not published: `no`
BRIDGE = "regd.bridge"  # the name under which a bridge registers itself
PRIORITY_FARTHER = 100  # added to the priority of another machine's instance
MACHINE_CHARS_MAX = 20
PREFIX_BYTES_MAX = 200
VALUE_BYTES_MAX = 65_536  # as a line of the daemon's protocol

_PRIORITY_MAX = 65_535
_REASON_CHARS_MAX = 200
_MACHINE = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_CLAIM = ".bridge"  # no service has such a name
_HASH_CHARS = 20
# The form of a shortened name of an instance. A name that happens to have this form gets a hash too, so that two
# instances of a machine never have the same name.
_SHORTENED = re.compile(rf".{{{DEFAULT.instance_chars_max - _HASH_CHARS - 1}}}-[0-9a-f]{{{_HASH_CHARS}}}")

Instance = Mapping[str, Any]  # as `list` and `watch` show it


class Place(NamedTuple):
    """The instance that a key in etcd names. Places are in order of machine, name and instance."""

    machine: str
    name: str
    instance: str


def check_machine(text: str) -> str:
    """Return the name of a machine.

    Raises:
        Invalid: it is not one label of at most 20 characters.
    """
    if len(text) > MACHINE_CHARS_MAX or not _MACHINE.fullmatch(text):
        raise Invalid(
            f"must be 1 to {MACHINE_CHARS_MAX} of a-z 0-9 - _, beginning and ending with a letter, digit or _"
        )
    return text


def check_prefix(text: str) -> str:
    """Return a prefix of keys, ending with a slash.

    Raises:
        Invalid: it is not printable ASCII between two slashes.
    """
    if not (2 <= len(text) <= PREFIX_BYTES_MAX and text.startswith("/") and text.endswith("/")):
        raise Invalid(f"must be 2 to {PREFIX_BYTES_MAX} characters, the first and the last one /")
    if not all("!" <= letter <= "~" for letter in text):
        raise Invalid("must be ASCII without blanks")
    return text


def check_advertise(text: str) -> str:
    """Return the address of a machine for others.

    Raises:
        Invalid: others cannot connect to it.
    """
    if "%" in model.check_host(text):
        raise Invalid("must be valid on other machines too: leave out the interface behind the %")
    return text


# Keys.


def machine_prefix(prefix: str, machine: str) -> bytes:
    """Return the prefix of all keys of a machine."""
    return f"{prefix}{machine}/".encode()


def key_of(prefix: str, place: Place) -> bytes:
    """Return the key of an instance: PREFIX/MACHINE/NAME/INSTANCE."""
    return f"{prefix}{'/'.join(place)}".encode()


def claim_key(prefix: str, machine: str) -> bytes:
    """Return the key by which a bridge claims the name of its machine."""
    return machine_prefix(prefix, machine) + _CLAIM.encode()


def place_of(prefix: str, key: bytes) -> Place:
    """Return the instance that a key names. For the claim of a machine, its name is "".

    Raises:
        Invalid: the key has another form.
    """
    try:
        parts = key.decode("ascii").removeprefix(prefix).split("/")
    except UnicodeDecodeError:
        raise Invalid("is not ASCII") from None
    if len(parts) == 2 and parts[1] == _CLAIM:
        return Place(check_machine(parts[0]), "", "")
    if len(parts) != 3:
        raise Invalid("must be MACHINE/NAME/INSTANCE")
    return Place(check_machine(parts[0]), model.check_name(parts[1]), model.check_instance(parts[2]))


# Values.


def value_of(instance: Instance, host: str, epoch: str) -> bytes:
    """Return the value for a local instance that others reach at `host`."""
    fields = {
        "host": host,
        "port": instance["port"],
        "meta": instance["meta"],
        "state": instance["state"],
        "priority": instance.get("priority", 0),
        "rev": instance["rev"],
        "epoch": epoch,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def published(value: bytes) -> dict[str, Any]:
    """Return the fields of a value. Those that are left out have the defaults of `register`.

    Raises:
        Invalid: no bridge would write it.
    """
    if len(value) > VALUE_BYTES_MAX:
        raise Invalid(f"has more than {VALUE_BYTES_MAX} bytes")
    try:
        fields = parse_object(value)
    except Refused as refusal:
        raise Invalid(refusal.message) from None
    return {
        "host": _checked(fields, "host", model.check_host),
        "port": _checked(fields, "port", model.check_port),
        "meta": _checked(fields, "meta", model.check_meta, {}),
        "state": str(_checked(fields, "state", model.check_state, "ready")),
        "priority": _checked(fields, "priority", model.check_priority, 0),
    }


def _checked(fields: Mapping[str, Any], name: str, check: Any, default: object = None) -> Any:
    try:
        return check(fields.get(name, default))
    except Invalid as error:
        raise Invalid(f"{name} {error}"[:_REASON_CHARS_MAX]) from None  # it may quote a key of meta


# What is published.


def reason_not_to_publish(instance: Instance, machine: str) -> str:
    """Return why a local instance is not published even if others can reach it; "" if it is published."""
    meta = instance["meta"]
    if MACHINE in meta:
        return f"its meta has {MACHINE}: it is of another machine"
    if meta.get(PUBLISH) == "no":
        return f"its meta has {PUBLISH}=no"
    try:
        model.check_meta({**meta, MACHINE: machine})
    except Invalid as error:
        return f"its meta has no room for {MACHINE}: it {error}"
    if "%" in instance["host"]:
        return f"its address {instance['host']} is valid on this machine only"
    return ""


def is_loopback(host: str) -> bool:
    """Return whether a host means the client's own machine, whichever client connects to it."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


# Registrations of other machines' instances.


def arrival_key(place: Place) -> model.Key:
    """Return the name and instance with which an instance of another machine is registered.

    The instance is MACHINE or MACHINE.INSTANCE, and ends in a hash if that is too long.
    """
    whole = f"{place.machine}.{place.instance}" if place.instance else place.machine
    if len(whole) <= DEFAULT.instance_chars_max and not _SHORTENED.fullmatch(whole):
        return place.name, whole
    tail = hashlib.sha256(whole.encode()).hexdigest()[:_HASH_CHARS]
    return place.name, f"{whole[: DEFAULT.instance_chars_max - _HASH_CHARS - 1]}-{tail}"


def arrival(place: Place, fields: Mapping[str, Any], *, loopback: bool) -> dict[str, Any]:
    """Return the fields with which an instance of another machine is registered, in addition to its key.

    Args:
        place: from the key.
        fields: from `published`.
        loopback: whether an address on loopback is that of a machine, as in a trial on one machine.

    Raises:
        Invalid: it cannot be registered here.
    """
    host = fields["host"]
    if "%" in host or (not loopback and is_loopback(host)):  # valid on the machine that wrote it only
        raise Invalid(f"host {host} is not an address of another machine")
    meta = _checked({"meta": {**fields["meta"], MACHINE: place.machine}}, "meta", model.check_meta)
    priority = min(fields["priority"] + PRIORITY_FARTHER, _PRIORITY_MAX)
    return {**fields, "meta": meta, "priority": priority}


def is_arrival(instance: Instance) -> bool:
    """Return whether an instance in the local daemon is one of another machine, registered by a bridge.

    The label alone does not prove it: a service may have copied its labels from such an instance. But a bridge
    also begins the name of the instance with that of the machine.
    """
    machine, own = instance["meta"].get(MACHINE), instance["instance"]
    if machine is None or not (own == machine or own.startswith(f"{machine}.")):
        return False
    return instance.get("hold", False) and "pid" not in instance
