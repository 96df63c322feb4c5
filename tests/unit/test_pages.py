"""What `get --from xds` shows of what was accepted."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage

from pykmesh.contracts.messages import ResourceType
from pykmesh.proto.workload_pb2 import Address, Extension, Service
from services.xds_client.pages import _of_kind
from services.xds_client.store import Held


def test_extensions_that_nobody_knows_are_shown_by_their_bytes() -> None:
    known = AnyMessage()
    known.Pack(Service(name="inner"))
    configs = {
        "foo": AnyMessage(type_url="type.googleapis.com/istio.extensions.Foo", value=b"\x0a\x01a"),
        "broken": AnyMessage(type_url="type.googleapis.com/google.protobuf.UInt32Value", value=b"\xff"),
        "known": known,
        "long": AnyMessage(
            type_url="type.googleapis.com/google.protobuf.Duration", value=b"\x08\xff\xff\xff\xff\xff\xff\x7f"
        ),
    }
    extensions = [Extension(name=name, config=config) for name, config in configs.items()]
    service = Service(name="web", namespace="shop", hostname="web.example", extensions=extensions)
    value = Address(service=service).SerializeToString()
    held = {ResourceType.ADDRESS: {"shop/web.example": Held("1", value)}, ResourceType.AUTHORIZATION: {}}
    (found,) = _of_kind("service", held)
    foo, broken, known_one, long = found["extensions"]
    assert found["hostname"] == "web.example"
    assert foo["config"] == {"@type": "type.googleapis.com/istio.extensions.Foo", "value": "CgFh"}
    assert broken["config"]["value"] == "/w=="
    assert long["config"]["@type"] == "type.googleapis.com/google.protobuf.Duration"
    assert known_one["config"]["name"] == "inner"
