"""Who workloads are by name, and who has none."""

from __future__ import annotations

from typing import Any

from pykmesh.proto.workload_pb2 import Address, Workload
from services.map_writer.principals import Account, Principals


def workload(uid: str, namespace: str, account: str = "", domain: str = "") -> bytes:
    said = Workload(uid=uid, namespace=namespace, service_account=account, trust_domain=domain)
    return Address(workload=said).SerializeToString()


def principals() -> Principals:
    nobodys: Any = None
    return Principals(nobodys)


def test_names_are_those_of_spiffe_and_each_is_there_once() -> None:
    raws = [workload(f"w{i}", "shop", "web") for i in range(3)] + [workload("far", "a", "", "far.example")]
    assert principals().accounts(raws) == {
        "cluster.local/ns/shop/sa/web": Account("shop", "shop/web"),
        "far.example/ns/a/sa/default": Account("a", "a/default"),
    }


def test_an_account_in_several_trust_domains_has_no_name_until_one_is_left() -> None:
    found, one, other = principals(), workload("w", "a", "b"), workload("v", "a", "b", "far.example")
    assert found.accounts([one, other]) == {}
    assert found.accounts([other]) == {"far.example/ns/a/sa/b": Account("a", "a/b")}


def test_what_says_no_namespace_or_nothing_that_can_be_read_is_nobody() -> None:
    assert principals().accounts([workload("w", "", "b"), b"\xff"]) == {}
