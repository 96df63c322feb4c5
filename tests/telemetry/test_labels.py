"""Labels: Istio's, in Istio's words."""

from __future__ import annotations

from pykmesh.kernel.layout import Direction
from services.telemetry.labels import LABELS, Edge, labels
from tests.telemetry.rows import CLIENT, SERVER, VIP, WEB, ip, service_address, workload

OUT = Edge(ip(CLIENT), ip(SERVER), 7, Direction.OUTBOUND, "-")
IN = Edge(ip(SERVER), ip(CLIENT), 0, Direction.INBOUND, "-")


def named(edge: Edge, *ends: object) -> dict[str, str]:
    return dict(zip(LABELS, labels(edge, *ends), strict=True))


def test_the_labels_are_those_of_istio():
    workload_labels = [
        "workload",
        "canonical_service",
        "canonical_revision",
        "workload_namespace",
        "principal",
    ]
    workload_labels += ["app", "version", "cluster", "region", "zone"]
    assert sorted(LABELS) == sorted(
        ["reporter", "request_protocol", "response_flags", "connection_security_policy"]
        + [f"{end}_{name}" for end in ("source", "destination") for name in workload_labels]
        + ["destination_service", "destination_service_namespace", "destination_service_name"]
    )


def test_the_source_reports_what_goes_out():
    found = named(OUT, workload("client"), workload("web"), WEB)
    assert found["reporter"] == "source"
    assert (found["source_workload"], found["destination_workload"]) == ("client", "web")
    assert (found["destination_canonical_service"], found["destination_app"]) == ("web-app", "web-app")
    assert (found["destination_canonical_revision"], found["destination_version"]) == ("v2", "v2")
    assert found["destination_service"] == "web.shop.svc.cluster.local"
    assert (found["destination_service_name"], found["destination_service_namespace"]) == ("web", "shop")
    assert (found["request_protocol"], found["response_flags"]) == ("tcp", "-")


def test_the_destination_reports_what_comes_in():
    assert named(IN, workload("client"), workload("web"), None)["reporter"] == "destination"


def test_what_comes_in_is_taken_for_traffic_to_the_first_service_of_who_accepts_it():
    web = workload("web", service="shop/web.shop.svc.cluster.local")
    found = named(IN, workload("client"), web, None)
    assert found["destination_service"] == "web.shop.svc.cluster.local"
    assert (found["destination_service_name"], found["destination_service_namespace"]) == ("web", "shop")
    assert named(IN, web, workload("client"), None)["destination_service"] == "unknown"
    direct = Edge(ip(CLIENT), ip(SERVER), 0, Direction.OUTBOUND, "-")
    assert named(direct, workload("client"), web, None)["destination_service"] == "unknown"


def test_what_goes_to_a_services_own_address_names_the_service_and_no_workload():
    refused = Edge(ip(CLIENT), ip(VIP), 0, Direction.OUTBOUND, "CONNECT")
    found = named(refused, workload("client"), service_address(), None)
    assert found["destination_service"] == "web.shop.svc.cluster.local"
    ends = {name: value for name, value in found.items() if name.startswith("destination_")}
    assert {name for name, value in ends.items() if value != "unknown"} == {
        "destination_service",
        "destination_service_name",
        "destination_service_namespace",
    }


def test_what_is_not_known_is_unknown():
    found = named(OUT, None, workload("web"), None)
    assert found["source_workload"] == found["destination_service"] == found["destination_zone"] == "unknown"


def test_an_address_proves_no_identity_and_plaintext_is_no_mutual_tls():
    found = named(OUT, workload("client"), workload("web"), WEB)
    assert found["source_principal"] == found["destination_principal"] == "unknown"
    assert found["connection_security_policy"] == "unknown"
