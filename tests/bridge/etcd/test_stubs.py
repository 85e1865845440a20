"""The generated code matches the proto files."""

import re

import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor

from regd.bridge.etcd.stubs import kv_pb2, rpc_pb2
from tests.support.daemon import ROOT

STUBS = ROOT / "regd" / "bridge" / "etcd" / "stubs"


def fields(message: Descriptor) -> set[tuple[str, str, int]]:
    own = {(message.name, field.name, field.number) for field in message.fields}
    return own.union(*(fields(nested) for nested in message.nested_types))


@pytest.mark.parametrize(("name", "generated"), [("kv", kv_pb2.DESCRIPTOR), ("rpc", rpc_pb2.DESCRIPTOR)])
def test_generated_code_has_the_fields_of_the_proto_file(name: str, generated: FileDescriptor) -> None:
    text = re.sub(r"//.*", "", (STUBS / f"{name}.proto").read_text())
    text = re.sub(r"enum \w+ \{[^}]*\}", "", text)
    expected = set()
    for message, body in re.findall(r"^message (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        expected |= {(message, field, int(number)) for field, number in re.findall(r"(\w+) = (\d+);", body)}
    assert len(expected) > 5
    assert set().union(*map(fields, generated.message_types_by_name.values())) == expected
