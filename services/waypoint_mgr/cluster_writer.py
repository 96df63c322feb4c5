"""Makes an API server say what waypoints are: Services, EndpointSlices, their status and that of routes.

Several nodes may write: what is a node's own is labelled with its name, all else is the same from each of
them, applied on the server's side. What cannot be written is told and tried again.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import anyio
import httpx2
import structlog
from lightkube.core.async_client import AsyncClient
from lightkube.types import PatchType

from pykmesh.contracts.waypoints import slice_name
from pykmesh.manifests.objects import GATEWAY_NAME, WAYPOINT_CLASS, ObjectRef
from services.waypoint_mgr.announce import Announced, Said
from services.waypoint_mgr.attachments import Condition
from services.waypoint_mgr.cluster import (
    FAILURES,
    NOT_FOUND,
    READ,
    Cluster,
    Kind,
    everywhere,
    resource,
    status_of,
)
from services.waypoint_mgr.cluster_status import CONTROLLER, class_status, gateway_status, route_parents

log = structlog.get_logger(__name__)

Plain = dict[str, Any]
MANAGER: Final = "pykmesh-waypoint"
"""Who owns fields, and whose objects are whose."""
NODE_LABEL: Final = "pykmesh.io/node"
AGAIN_S: Final = 30.0
"""How often all is written again: somebody may have changed it."""
RETRY_S: Final = 0.5
"""The first time; twice as long each time after."""
CONFLICT: Final = 409
LABEL_MAX: Final = 63
_SLICE: Final = Kind("discovery.k8s.io", ("v1",), "EndpointSlice", "endpointslices")
_CLASS: Final = Kind(
    "gateway.networking.k8s.io", ("v1",), "GatewayClass", "gatewayclasses", is_namespaced=False
)
_CLASS_REF: Final = ObjectRef(_CLASS.name, "", WAYPOINT_CLASS)
_KINDS: Final = {kind.name: kind for kind in (*READ, _SLICE, _CLASS)}
_MANAGED_BY: Final = {
    "Service": "app.kubernetes.io/managed-by",
    "EndpointSlice": "endpointslice.kubernetes.io/managed-by",
}


class ClusterWriter:
    """`say` takes what shall be, `run` makes it so."""

    def __init__(
        self, client: AsyncClient, cluster: Cluster, node: str, note_error: Callable[..., None]
    ) -> None:
        self._client = client
        self._cluster = cluster
        cluster.gone = self._make_again
        self._node = node
        self._label = (
            node if len(node) <= LABEL_MAX else hashlib.sha256(node.encode()).hexdigest()[:LABEL_MAX]
        )
        self._note_error = note_error
        self._said: Said | None = None
        """Nothing is written, nor removed, before it is known what shall be."""
        self._due = anyio.Event()
        self._applied: dict[ObjectRef, Plain] = {}
        """What the server has taken, since all was written last."""
        self._ours: set[ObjectRef] = set()
        """What is not somebody else's."""
        self._addresses: dict[ObjectRef, list[str]] = {}
        """Of the Services of waypoints, by their Gateways."""
        self._errors: dict[str, str] = {}
        """Of what could not be written, why."""
        self._is_behind = False
        """Somebody wrote what is not read here yet."""

    def say(self, said: Said) -> None:
        if said != self._said:
            self._said = said
            self._due.set()

    def _make_again(self, ref: ObjectRef) -> None:
        """At once, if it is ours: without its Service a waypoint has no address."""
        if self._applied.pop(ref, None) is not None:
            self._ours.discard(ref)
            self._due.set()

    async def run(self) -> None:
        """Until cancelled."""
        whole_at, told, wait_s, next_s = float("-inf"), "", AGAIN_S, RETRY_S
        while True:
            with anyio.move_on_after(wait_s):
                await self._due.wait()
            self._due = anyio.Event()
            if self._said is None:
                continue
            if is_whole := time.monotonic() - whole_at >= AGAIN_S:
                self._applied.clear()
                self._ours.clear()
                whole_at = time.monotonic()
            self._errors, self._is_behind = {}, False
            await self._write(self._said, is_whole=is_whole)
            is_done = not (self._errors or self._is_behind)
            if is_done:
                wait_s, next_s = AGAIN_S, RETRY_S
            else:
                wait_s, next_s = next_s, min(2 * next_s, AGAIN_S)
            before, told = told, "; ".join(f"{what}: {why}" for what, why in self._errors.items())
            if told not in ("", before):
                self._note_error("api_server_not_written", error=told)

    async def _try(self, what: object, work: Awaitable[None]) -> None:
        """One object holds up no other."""
        try:
            await work
        except FAILURES as error:
            if _http_status(error) == CONFLICT:
                self._is_behind = True
            else:
                self._errors[str(what)] = str(error)

    async def _write(self, said: Said, *, is_whole: bool) -> None:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if said.waypoints and _CLASS_REF not in self._applied:
            await self._try(f"GatewayClass {WAYPOINT_CLASS}", self._write_class(now))
        wanted = {}
        for waypoint in said.waypoints:
            for manifest in waypoint.manifests or ():
                own = self._own(manifest, waypoint)
                ref = ObjectRef(own["kind"], waypoint.ref.namespace, own["metadata"]["name"])
                wanted[ref] = own
                if self._applied.get(ref) != own:
                    await self._try(ref, self._apply(ref, own, waypoint))
        if is_whole or self._applied.keys() - {*wanted, _CLASS_REF}:
            await self._try("what is gone", self._remove_all_but(wanted, said.waypoints))
        for waypoint in said.waypoints:
            await self._try(f"status of {waypoint.ref}", self._write_gateway(waypoint, now))
        for route, conditions in said.routes.items():
            await self._try(f"status of {route}", self._write_route(route, conditions, now))

    def _own(self, manifest: Plain, waypoint: Announced) -> Plain:
        """With what says whose it is. Of a Service each node says the same."""
        kind, metadata = manifest["kind"], manifest["metadata"]
        labels = {**metadata["labels"], _MANAGED_BY[kind]: MANAGER}
        name = metadata["name"]
        if kind == _SLICE.name:
            name = slice_name(name, self._node)
            labels[NODE_LABEL] = self._label
        owner = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "name": waypoint.ref.name,
            "uid": waypoint.uid,
        }
        own = {**metadata, "name": name, "labels": labels, "ownerReferences": [owner]}
        return {**manifest, "metadata": own}

    async def _apply(self, ref: ObjectRef, manifest: Plain, waypoint: Announced) -> None:
        if ref not in self._ours:
            before = await self._get(ref)
            if before and before["metadata"].get("labels", {}).get(_MANAGED_BY[ref.kind]) != MANAGER:
                raise ValueError("there is one already, which is somebody else's and stays as it is")
            self._ours.add(ref)
        made = await self._patch(resource(_KINDS[ref.kind]), ref, manifest)
        self._applied[ref] = manifest
        if ref.kind == "Service":
            self._addresses[waypoint.ref] = list(made["spec"].get("clusterIPs", ()))
            log.info(
                "waypoint_announced", waypoint=str(waypoint.ref), addresses=self._addresses[waypoint.ref]
            )

    async def _patch(self, of: Any, ref: ObjectRef, body: Plain, kind: PatchType = PatchType.APPLY) -> Any:
        words: dict[str, Any] = {"namespace": ref.namespace} if ref.namespace else {}
        if kind is PatchType.APPLY:
            words["force"] = True
        return await self._client.patch(of, ref.name, body, patch_type=kind, field_manager=MANAGER, **words)

    async def _remove_all_but(self, wanted: Iterable[ObjectRef], waypoints: Iterable[Announced]) -> None:
        """Of what is ours. Nothing goes of a waypoint of which it is not known yet what runs."""
        kept, unknown = {*wanted}, {each.ref for each in waypoints if each.manifests is None}
        for kind in (_KINDS["Service"], _SLICE):
            found, labels = resource(kind), dict[str, Any]({_MANAGED_BY[kind.name]: MANAGER})
            if kind is _SLICE:
                labels[NODE_LABEL] = self._label
            async for plain in self._client.list(found, labels=labels, **everywhere(found)):
                metadata = plain["metadata"]
                ref = ObjectRef(kind.name, metadata["namespace"], metadata["name"])
                gateway = ObjectRef("Gateway", ref.namespace, metadata["labels"].get(GATEWAY_NAME, ""))
                if ref in kept or gateway in unknown:
                    continue
                # Each node writes the Service: what one has not heard of another may be just making.
                if kind is _SLICE or await self._get(gateway) is None:
                    await self._delete(found, ref)

    async def _get(self, ref: ObjectRef) -> Plain | None:
        """As the server has it this moment."""
        try:
            found: Plain = await self._client.get(
                resource(_KINDS[ref.kind]), ref.name, namespace=ref.namespace
            )
        except httpx2.HTTPStatusError as error:
            if _http_status(error) != NOT_FOUND:
                raise
            return None
        return found

    async def _delete(self, of: Any, ref: ObjectRef) -> None:
        try:
            await self._client.delete(of, ref.name, namespace=ref.namespace)
        except httpx2.HTTPStatusError as error:
            if _http_status(error) != NOT_FOUND:
                raise
        self._applied.pop(ref, None)
        self._ours.discard(ref)
        log.info("waypoint_unannounced", object=str(ref))

    async def _write_class(self, now: str) -> None:
        ref = _CLASS_REF
        head = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": _CLASS.name}
        named = {**head, "metadata": {"name": ref.name}}
        made = await self._patch(resource(_CLASS), ref, {**named, "spec": {"controllerName": CONTROLLER}})
        await self._patch(status_of(_CLASS), ref, {**named, "status": class_status(made, now)})
        self._applied[ref] = named

    async def _write_gateway(self, waypoint: Announced, now: str) -> None:
        plain, addresses = self._cluster.plain(waypoint.ref), self._addresses.get(waypoint.ref)
        if plain is None or waypoint.manifests is None:
            return
        own = ObjectRef("Service", waypoint.ref.namespace, waypoint.ref.name)
        why = self._errors.get(str(own), "")
        is_reachable = waypoint.is_reachable and bool(addresses)
        status = gateway_status(
            plain,
            addresses or (),
            waypoint.hostname,
            waypoint.listeners,
            is_reachable=is_reachable,
            why=why,
            now=now,
        )
        await self._write_status(waypoint.ref, plain, status)

    async def _write_route(self, route: ObjectRef, conditions: Iterable[Condition], now: str) -> None:
        if (plain := self._cluster.plain(route)) is not None:
            await self._write_status(route, plain, {"parents": route_parents(plain, conditions, now)})

    async def _write_status(self, ref: ObjectRef, plain: Plain, status: Plain) -> None:
        """Whole lists, so onto what was read alone: another's change meanwhile is a conflict, tried again."""
        before = plain.get("status", {})
        if all(before.get(key, []) == value for key, value in status.items()):
            return
        version = {"resourceVersion": plain["metadata"]["resourceVersion"]}
        found = status_of(_KINDS[ref.kind], plain["apiVersion"].rpartition("/")[2])
        await self._patch(found, ref, {"metadata": version, "status": status}, PatchType.MERGE)


def _http_status(error: Exception) -> int:
    """Of HTTP; 0: it is none."""
    return error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else 0
