"""xds_client answers each response once, with what is good taken and what is bad named."""

from __future__ import annotations

import base64

import anyio.to_thread
import pytest
from google.protobuf.message import DecodeError

from pykmesh.cli import get_sources
from pykmesh.proto import authorization_pb2, workload_pb2
from tests.control.conftest import Client
from tests.control.resources import (
    Resource,
    broken_locality,
    host,
    pod,
    pod_message,
    policy,
    service,
    service_message,
    uid,
    unknown_field,
)
from tests.control.scripted_ads import ADDRESS, AUTHORIZATION, resource

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]

WEB, BAD_HOST, BAD_POD = host("web"), host("bad"), uid("bad")


def bad_pod(**fields: object) -> Resource:
    message = pod_message("bad", "10.1.0.1")
    for name, value in fields.items():
        setattr(message.workload, name, value)
    return resource(BAD_POD, message.SerializeToString())


def bad_service(change: object = None, *, port: int = 80, target: int = 8080) -> Resource:
    message = service_message("bad", "10.96.0.9", ports={port: target})
    if callable(change):
        change(message.service)
    return resource(BAD_HOST, message.SerializeToString())


def five_bytes() -> Resource:
    message = pod_message("bad")
    message.workload.addresses.append(bytes(5))
    return resource(BAD_POD, message.SerializeToString())


def other_type() -> Resource:
    found = pod("bad", "10.1.0.1")
    found.resource.type_url = AUTHORIZATION
    return found


def truncated() -> Resource:
    return resource(BAD_POD, pod_message("bad", "10.1.0.1").SerializeToString()[:-3])


REJECTED = {
    "an address of 5 bytes": (five_bytes, BAD_POD, "workload.addresses: an address has 4 or 16 bytes, not 5"),
    "service port 0": (lambda: bad_service(port=0), BAD_HOST, "service.ports.service_port: 0 is no port"),
    "service port 70000": (
        lambda: bad_service(port=70000),
        BAD_HOST,
        "service.ports.service_port: 70000 is no port",
    ),
    "target port 70000": (
        lambda: bad_service(target=70000),
        BAD_HOST,
        "service.ports.target_port: 70000 is no port",
    ),
    "an empty uid": (lambda: bad_pod(uid=""), BAD_POD, "workload.uid: empty"),
    "a uid that is not the resource's name": (
        lambda: bad_pod(uid="other"),
        BAD_POD,
        "name: the message is of other",
    ),
    "a service that is not the resource's name": (
        lambda: bad_service(lambda s: setattr(s, "namespace", "bank")),
        BAD_HOST,
        "name: the message is of bank/bad.shop.svc.cluster.local",
    ),
    "an unknown oneof": (
        lambda: resource(BAD_POD, b"\x1a\x02\x08\x01"),
        BAD_POD,
        "type: neither a workload nor a service",
    ),
    "an empty message": (lambda: resource(BAD_POD, b""), BAD_POD, "type: neither a workload nor a service"),
    "an unknown status": (lambda: bad_pod(status=7), BAD_POD, "workload.status: 7 is unknown"),
    "an unknown network mode": (
        lambda: bad_pod(network_mode=9),
        BAD_POD,
        "workload.network_mode: 9 is unknown",
    ),
    "LEGACY_ISTIO_MTLS": (
        lambda: bad_pod(tunnel_protocol=workload_pb2.LEGACY_ISTIO_MTLS),
        BAD_POD,
        "workload.tunnel_protocol: 2 is not supported",
    ),
    "an unknown load balancing mode": (
        lambda: bad_service(lambda s: setattr(s.load_balancing, "mode", 11)),
        BAD_HOST,
        "service.load_balancing.mode: 11 is not a valid Mode",
    ),
    "unknown families": (
        lambda: bad_service(lambda s: setattr(s, "ip_families", 4)),
        BAD_HOST,
        "service.ip_families: 4 is not a valid Families",
    ),
    "a prefix that is too long": (
        lambda: bad_service(lambda s: setattr(s.addresses[0], "length", 33)),
        BAD_HOST,
        "service.addresses.length: 33 of 32 bits",
    ),
    "a message cut short": (truncated, BAD_POD, "not an Address message: "),
    "the wrong type of resource": (
        other_type,
        BAD_POD,
        f"resource.type_url: {AUTHORIZATION!r} in a response of {ADDRESS!r}",
    ),
    "a resource of more than 4 MiB": (
        lambda: resource(BAD_POD, pod_message("bad").SerializeToString() + unknown_field(1 << 22)),
        BAD_POD,
        "resource: ",
    ),
}


async def test_an_empty_first_response_is_accepted_and_makes_ready(client: Client) -> None:
    status = await client.node.page("xds_client")
    assert status["synced"]
    assert status["acks"] == 2
    assert status["resources"] == {"address": 0, "authorization": 0}


async def test_what_was_accepted_is_held(client: Client) -> None:
    answer = await client.plane.push(service("web", "10.96.0.1"), pod("web-1", "10.1.0.1", services=["web"]))
    assert answer.accepted
    assert await client.node.held() == {WEB, uid("web-1")}
    assert (await client.plane.push(policy("p"), type_url=AUTHORIZATION)).accepted
    assert (await client.node.page("xds_client"))["resources"] == {"address": 2, "authorization": 1}


async def test_a_bad_resource_is_rejected_by_name_and_field_and_its_neighbours_are_kept(
    client: Client,
) -> None:
    for number, (what, (make, name, why)) in enumerate(REJECTED.items()):
        before, after = service(f"a-{number}", "10.96.1.1"), pod(f"z-{number}", "10.1.1.1")
        response = client.plane.response([before, make(), after])
        answer = await client.plane.send(response)
        assert answer.code == 3, what
        assert answer.error.startswith(f"{name}: {why}"), what
        assert answer.reasons.keys() == {name}, what
        held = await client.node.held()
        assert {before.name, after.name} <= held, what
        assert name not in held, what


async def test_what_decides_no_traffic_and_cannot_be_read_spoils_no_page(client: Client) -> None:
    broken = broken_locality("odd", "10.1.0.1")
    with pytest.raises(DecodeError):
        workload_pb2.Address.FromString(broken.resource.value)
    assert (await client.plane.push(broken, service("web", "10.96.0.1"), pod("a", "10.1.0.2"))).accepted
    (web,) = await client.node.page("xds_client", "/services")
    assert web["resource"] == WEB
    good, odd = await client.node.page("xds_client", "/workloads")
    assert (good["name"], good["addresses"]) == ("a", ["10.1.0.2"])
    assert (odd["resource"], odd["addresses"]) == (uid("odd"), ["10.1.0.1"])
    assert odd["error"].startswith("not an Address message: ")
    assert "error" not in good
    shown = await anyio.to_thread.run_sync(get_sources.read, client.node.instance, "workloads", "xds")
    assert len(get_sources.rows("workloads", shown)[1]) == 2


async def test_the_old_copy_of_a_rejected_resource_is_kept_with_its_version(client: Client) -> None:
    good = pod("bad", "10.1.0.7")
    assert (await client.plane.push(good)).accepted
    assert not (await client.plane.send(client.plane.response([bad_pod(status=7)]))).accepted
    (kept,) = await client.node.page("xds_client", "/workloads")
    assert kept["addresses"] == ["10.1.0.7"]
    assert kept["version"] == good.version
    ended = len(client.plane.streams)
    await client.plane.stream.end()
    stream = await client.plane.next_stream(ended)
    assert dict(stream.first[ADDRESS].initial_resource_versions) == {BAD_POD: good.version}


async def test_what_was_rejected_is_shown_with_why_until_it_is_good_or_gone(client: Client) -> None:
    async def shown(what: str) -> dict[str, str | None]:
        found = await anyio.to_thread.run_sync(get_sources.read, client.node.instance, what, "xds")
        columns, rows = get_sources.rows(what, found, "xds")
        assert columns[-1] == "ERROR"
        assert len(rows) == len(found)
        return {entry["resource"]: entry.get("error") for entry in found}

    bad = resource(
        "shop/p", authorization_pb2.Authorization(name="p", action=5).SerializeToString(), AUTHORIZATION
    )
    new, broken = bad_pod(uid=uid("new"), status=7), bad_service(port=0)
    new.name = uid("new")
    assert (await client.plane.push(pod("bad", "10.1.0.7"), service("web", "10.96.0.1"))).accepted
    await client.plane.send(client.plane.response([bad_pod(status=7), new, broken]))
    await client.plane.send(client.plane.response([bad], type_url=AUTHORIZATION))
    unknown = "workload.status: 7 is unknown"
    assert await shown("workloads") == {BAD_POD: unknown, uid("new"): unknown}
    assert await shown("services") == {WEB: None, BAD_HOST: "service.ports.service_port: 0 is no port"}
    assert await shown("policies") == {bad.name: "action: 5 is unknown"}
    assert (await client.plane.push(pod("bad", "10.1.0.8"), removed=[uid("new"), broken.name])).accepted
    assert await shown("workloads") == {BAD_POD: None}
    assert await shown("services") == {WEB: None}


async def test_a_name_that_comes_twice_is_rejected_and_the_first_copy_is_kept(client: Client) -> None:
    twice = [pod("twice", "10.1.0.1"), pod("good", "10.1.0.3"), pod("twice", "10.1.0.2")]
    answer = await client.plane.send(client.plane.response(twice))
    assert answer.reasons == {uid("twice"): "name: twice in one response"}
    held = {e["resource"]: e["addresses"] for e in await client.node.page("xds_client", "/workloads")}
    assert held == {uid("twice"): ["10.1.0.1"], uid("good"): ["10.1.0.3"]}


async def test_a_resource_without_a_name_is_rejected(client: Client) -> None:
    nameless = pod("x", "10.1.0.1")
    nameless.name = ""
    answer = await client.plane.send(client.plane.response([nameless, pod("good", "10.1.0.3")]))
    assert answer.reasons == {"(no name)": "name: empty"}
    assert await client.node.held() == {uid("good")}


@pytest.mark.parametrize(("field", "value"), [("action", 5), ("scope", 8)])
async def test_a_policy_with_an_unknown_word_is_rejected_never_guessed(
    client: Client, field: str, value: int
) -> None:
    message = authorization_pb2.Authorization(name="p", namespace="shop")
    setattr(message, field, value)
    bad = resource("shop/p", message.SerializeToString(), AUTHORIZATION)
    answer = await client.plane.send(client.plane.response([bad, policy("q")], type_url=AUTHORIZATION))
    assert answer.reasons == {"shop/p": f"{field}: {value} is unknown"}
    assert (await client.node.page("xds_client"))["resources"]["authorization"] == 1


async def test_a_policy_whose_rules_cannot_be_read_is_rejected(client: Client) -> None:
    """A rule that is not there denies less, or allows more."""
    head = authorization_pb2.Authorization(name="p", namespace="shop", action=authorization_pb2.DENY)
    bad = resource("shop/p", head.SerializeToString() + b"\x2a\x02\x0a\xff", AUTHORIZATION)
    answer = await client.plane.send(client.plane.response([bad, policy("q")], type_url=AUTHORIZATION))
    assert answer.reasons.keys() == {"shop/p"}
    assert answer.reasons["shop/p"].startswith("not an Authorization message")


async def test_a_response_of_a_type_that_was_not_asked_for_gets_a_nack_of_that_type(client: Client) -> None:
    cluster = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    response = client.plane.response([], type_url=cluster)
    await client.plane.stream.write_bytes(response.SerializeToString())
    request = await client.plane.unknown_answer(1)
    assert (request.type_url, request.response_nonce) == (cluster, response.nonce)
    assert request.error_detail.message == f"type_url: {cluster!r} was not asked for"
    assert (await client.plane.push(pod("web-1", "10.1.0.1"))).accepted


async def test_removed_names_that_were_never_sent_are_passed_over(client: Client) -> None:
    assert (await client.plane.push(pod("a", "10.1.0.1"))).accepted
    assert (await client.plane.push(removed=[uid("never"), host("never")])).accepted
    assert (await client.plane.push(removed=["shop/never"], type_url=AUTHORIZATION)).accepted
    assert await client.node.held() == {uid("a")}
    assert await client.node.errors("xds_client") == []


async def test_a_name_removed_and_sent_in_one_response_is_there_afterwards(client: Client) -> None:
    await client.plane.push(pod("a", "10.1.0.1"))
    response = client.plane.response([pod("a", "10.1.0.2")], [uid("a"), uid("b")])
    assert (await client.plane.send(response)).accepted
    (held,) = await client.node.page("xds_client", "/workloads")
    assert held["addresses"] == ["10.1.0.2"]


async def test_responses_sent_at_once_are_answered_in_order_each_by_itself(client: Client) -> None:
    waiting = [await client.plane.tell(pod(f"p-{n}", f"10.1.0.{n}")) for n in range(1, 30)]
    waiting += [await client.plane.tell(policy(f"p-{n}"), type_url=AUTHORIZATION) for n in range(1, 30)]
    assert all([(await answer).accepted for answer in waiting])  # the server checks nonces and their order
    assert (await client.node.page("xds_client"))["acks"] == 2 + 58


async def test_a_message_larger_than_grpcs_default_is_taken(client: Client) -> None:
    pods = [pod(f"big-{n}", f"10.2.{n // 250}.{n % 250}", services=["web"]) for n in range(60)]
    for item in pods:
        item.resource.value += unknown_field(100_000)
    response = client.plane.response(pods)
    assert response.ByteSize() > 4 * 1024 * 1024
    assert (await client.plane.send(response)).accepted
    assert len(await client.node.held()) == 60


async def test_a_nack_of_many_resources_is_cut_to_a_readable_length(client: Client) -> None:
    bad = [resource(f"Kubernetes//Pod/shop/bad-{n}", b"") for n in range(1000)]
    answer = await client.plane.send(client.plane.response([*bad, pod("good", "10.1.0.1")]))
    assert not answer.accepted
    assert len(answer.error) <= 4000
    assert await client.node.held() == {uid("good")}


async def test_bytes_that_are_no_response_end_the_stream_and_not_the_process(client: Client) -> None:
    await client.plane.push(pod("a", "10.1.0.1"))
    before, streams = client.node.supervisor.pids["xds_client"], len(client.plane.streams)
    await client.plane.stream.write_bytes(base64.b64decode("/////w=="))
    await client.plane.next_stream(streams)
    assert (await client.plane.push(pod("b", "10.1.0.2"))).accepted
    assert await client.node.held() == {uid("a"), uid("b")}
    assert client.node.supervisor.pids["xds_client"] == before
    (error,) = (await client.node.page("xds_client"))["errors"]
    assert "no DeltaDiscoveryResponse" in error["detail"]
