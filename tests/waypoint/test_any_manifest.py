"""Whatever is read of routes, policies and rules becomes what an Envoy takes, and no error."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.manifests.objects import (
    AuthorizationPolicy,
    DestinationRule,
    GRPCRoute,
    HTTPRoute,
    Object,
    RequestAuthentication,
    VirtualService,
)
from services.waypoint_mgr.blame import bootstrap_of
from services.waypoint_mgr.instances import refusal
from services.waypoint_mgr.source import Authentication, Destination, Policy, Route, Virtual
from tests.fuzz.shapes import NAMESPACE, PORT, drawn

from .world import (
    DOMAIN,
    TO_WEB,
    World,
    ads_server,
    http_route,
    kubernetes_service,
    mesh_service,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("one_event_loop")]

KINDS = (HTTPRoute, GRPCRoute, VirtualService, DestinationRule, RequestAuthentication, AuthorizationPolicy)
WORLDS = 150


def world_with(*objects: Object) -> World:
    world, nobody = World(), [Endpoint("127.0.0.1", 9)]
    ports = [{"name": "http", "port": PORT}, {"name": "tcp", "port": 90}]
    world.add_user(
        mesh_service(NAMESPACE, "web", {PORT: nobody, 90: nobody}, ["10.0.0.1"]),
        kubernetes_service(NAMESPACE, "web", *ports),
    )
    for name in ("v1", "v2"):
        world.add_backend(mesh_service(NAMESPACE, name, {PORT: nobody}))
    for each in objects:
        match each:
            case HTTPRoute() | GRPCRoute():
                world.routes.append(Route.of(each))
            case VirtualService():
                world.virtuals.append(Virtual.of(each, DOMAIN))
            case DestinationRule():
                world.destinations.append(Destination.of(each, DOMAIN))
            case RequestAuthentication():
                world.authentications.append(Authentication.of(each, DOMAIN, {}))
            case AuthorizationPolicy():
                world.policies.append(Policy.of(each, DOMAIN, {}))
    return world


@pytest.mark.parametrize("kind", [*(kind.__name__ for kind in KINDS), "all"])
async def test_an_envoy_takes_it(folder: Path, kind: str) -> None:
    chance = Random(kind)
    kinds = [each.__name__ for each in KINDS] if kind == "all" else [kind]
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        for number in range(WORLDS):
            objects = [drawn(chance, each, f"o{number}") for each in kinds]
            configuration = world_with(*objects).configuration()
            status = await envoy.apply(configuration)
            assert not status.refusals, objects
            if number % 10 == 0:
                assert await refusal(bootstrap_of(configuration)) == "", (
                    "nor does one that is only asked refuse"
                )


async def test_an_envoy_that_is_asked_takes_what_one_that_serves_takes() -> None:
    """Also an expression that is longer than Envoy takes unless it is told to."""
    name = "|".join(f"segment{number}" for number in range(40))
    world = world_with()
    match = {"path": {"type": "RegularExpression", "value": f"/({name})/.*"}}
    world.routes = [http_route(NAMESPACE, "r", {"parentRefs": [TO_WEB], "rules": [{"matches": [match]}]})]
    assert await refusal(bootstrap_of(world.configuration())) == ""
