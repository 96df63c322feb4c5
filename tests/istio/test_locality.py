"""What istiod says of nearness, from the nodes' labels, decides which pods get connections."""

from __future__ import annotations

import errno

import pytest

from tests.istio.conftest import Mesh
from tests.istio.namespace import Namespace
from tests.istio.traffic import answers, at, refusal, workload
from tests.mesh.manifests import Object, service
from tests.mesh.node import until


def elsewhere(pod: Object) -> Object:
    """The pod on the node of the other zone."""
    return {**pod, "spec": {**pod["spec"], "nodeName": "n2"}}


def test_the_node_knows_where_it_is_from_a_pod_on_it(mesh: Mesh) -> None:
    said = until(lambda: mesh.node.status()["processes"]["map_writer"]["locality"], "a locality")
    assert (said["region"], said["zone"], said["node"]) == ("eu", "a", "n1")


@pytest.mark.parametrize("nearness", ["PreferClose", "PreferSameZone", "PreferSameNode"])
def test_the_near_pods_are_chosen_and_the_far_ones_when_there_is_no_other(
    mesh: Mesh, namespace: Namespace, nearness: str
) -> None:
    near, far, _ = mesh.web
    web = service("web", app="web", ports={80: 8080})
    web["spec"]["trafficDistribution"] = nearness
    namespace.apply(web, workload(near), elsewhere(workload(far)))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, near))
    assert answers(mesh.client, namespace.vips("web")[0]) == {near.name}
    namespace.apply(workload(near, ready=False))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, far))
    assert answers(mesh.client, namespace.vips("web")[1]) == {far.name}


def test_a_service_of_its_node_alone_is_refused_when_its_pods_are_elsewhere(
    mesh: Mesh, namespace: Namespace
) -> None:
    near, far, _ = mesh.web
    web = service("web", app="web", ports={80: 8080})
    web["spec"]["internalTrafficPolicy"] = "Local"
    namespace.apply(web, workload(near), elsewhere(workload(far)))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, near))
    assert answers(mesh.client, namespace.vips("web")[0]) == {near.name}
    namespace.delete("Pod", near.name)
    mesh.node.until_endpoints(namespace.host("web"), set())
    assert refusal(mesh.client, namespace.vips("web")[0]) == errno.ECONNREFUSED
