"""What an API server says of waypoints and of what they are for: each kind is listed, then watched.

An object that cannot be read counts as it last was. A policy that never could be is taken to refuse all that
it is for: one broken policy must neither let anybody in nor hold up the waypoints of others. A field that is
not known, of a newer API, is told.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, Final, NamedTuple

import anyio
import httpx2
import msgspec
import structlog
import yaml
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.async_client import AsyncClient
from lightkube.core.exceptions import ConfigError, NotReadyError
from lightkube.core.resource import (
    ApiInfo,
    GlobalSubResource,
    NamespacedResourceG,
    NamespacedSubResource,
    Resource,
    ResourceDef,
)
from lightkube.generic_resource import (
    Generic,
    GenericGlobalResource,
    GenericNamespacedResource,
    create_api_info,
)

from pykmesh.contracts.settings import IN_CLUSTER
from pykmesh.manifests.authorization_policy import Action
from pykmesh.manifests.destination_rule import TLSMode
from pykmesh.manifests.http_route import GATEWAY_GROUP
from pykmesh.manifests.objects import (
    CLUSTER_CLASSES,
    KINDS,
    AuthorizationPolicy,
    BackendTLSPolicy,
    DestinationRule,
    Gateway,
    Object,
    ObjectRef,
    RequestAuthentication,
    from_plain,
    ref_of,
)
from pykmesh.manifests.unknown import unknown_fields
from services.waypoint_mgr.source import Objects

log = structlog.get_logger(__name__)

Plain = dict[str, Any]
FAILURES: Final = (
    httpx2.HTTPError,
    httpx2.InvalidURL,
    ConfigError,
    NotReadyError,
    OSError,
    msgspec.MsgspecError,
    KeyError,
    ValueError,
)
"""What a request to an API server may end with: lightkube takes the answer to be what it should."""
CONNECT_FAILURES: Final = (*FAILURES, AttributeError, AssertionError, TypeError, yaml.YAMLError)
"""What reading a kubeconfig may end with."""
WATCH_S: Final = 300
"""A watch ends after this time, and begins again where it was."""
SILENCE_S: Final = WATCH_S + 30.0
"""A watch that says nothing for so long may be dead: the kind is listed anew."""
RETRY_S: Final = 0.5
"""The first time; twice as long each time after."""
RETRY_MAX_S: Final = 30.0
MISSING_S: Final = 30.0
"""How often a kind is asked for that the server does not have."""
GONE_S: Final = 60.0
"""For so long a server that had objects of a kind, and says that there is no such kind, is not believed."""
SETTLE_S: Final = 0.02
CHUNK: Final = 500
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
_NAME_MAX: Final = 253
_EVENTS: Final = ("ADDED", "MODIFIED", "DELETED")


class Kind(NamedTuple):
    group: str
    versions: tuple[str, ...]
    """Of those that the server has the first is read."""
    name: str
    plural: str
    is_namespaced: bool = True
    is_optional: bool = False
    """Who may not list it is told so, and goes without."""


READ: Final = (
    Kind("", ("v1",), "Namespace", "namespaces", is_namespaced=False),
    Kind("", ("v1",), "Service", "services"),
    Kind("networking.istio.io", ("v1", "v1beta1"), "ServiceEntry", "serviceentries"),
    Kind("gateway.networking.k8s.io", ("v1", "v1beta1"), "Gateway", "gateways"),
    Kind("gateway.networking.k8s.io", ("v1", "v1beta1"), "HTTPRoute", "httproutes"),
    Kind("gateway.networking.k8s.io", ("v1",), "GRPCRoute", "grpcroutes"),
    Kind("gateway.networking.k8s.io", ("v1", "v1alpha2"), "TCPRoute", "tcproutes"),
    Kind(
        "gateway.networking.k8s.io",
        ("v1", "v1alpha3", "v1alpha2"),
        "BackendTLSPolicy",
        "backendtlspolicies",
        is_optional=True,
    ),
    Kind("security.istio.io", ("v1", "v1beta1"), "AuthorizationPolicy", "authorizationpolicies"),
    Kind("security.istio.io", ("v1", "v1beta1"), "RequestAuthentication", "requestauthentications"),
    Kind("networking.istio.io", ("v1", "v1beta1"), "DestinationRule", "destinationrules"),
    Kind("networking.istio.io", ("v1", "v1beta1"), "VirtualService", "virtualservices"),
)


@cache
def resource(kind: Kind, version: str = "") -> Any:
    """The kind as lightkube has it, its objects in plain types."""
    parent: type[Resource] = GenericNamespacedResource if kind.is_namespaced else GenericGlobalResource
    info = create_api_info(kind.group, version or kind.versions[0], kind.name, kind.plural)
    return type(kind.name, (parent,), {"_api_info": info})


@cache
def status_of(kind: Kind, version: str = "") -> Any:
    """The status of a kind, which is written for itself."""
    of = ResourceDef(kind.group, version or kind.versions[0], kind.name)
    info = ApiInfo(of, kind.plural, ["get", "patch"], of, "status")
    parent: type[Resource] = NamespacedSubResource if kind.is_namespaced else GlobalSubResource
    return type("Status", (parent, Generic), {"_api_info": info})


def everywhere(of: Any) -> dict[str, Any]:
    """Words for a request about objects of all namespaces."""
    return {"namespace": "*"} if issubclass(of, NamespacedResourceG) else {}


def connect(kubeconfig: str) -> AsyncClient:
    """A client of the API server that a file names, or the pod's own. ConfigError, OSError, ValueError."""
    if kubeconfig == IN_CLUSTER:
        found = KubeConfig.from_service_account()
    else:
        found = KubeConfig.from_file(kubeconfig)
    return AsyncClient(config=found.get())


class _Read(NamedTuple):
    """An object as it came, what it says, and why that may be less."""

    plain: Plain
    version: str
    object: Object | None
    error: str


class Cluster:
    """Tells what is configured, once every kind was listed, and whenever that changes."""

    def __init__(
        self,
        client: AsyncClient,
        domain: str,
        changed: Callable[[Objects], None],
        note_error: Callable[..., None],
    ) -> None:
        self._client = client
        self._domain = domain
        self._changed = changed
        self._note_error = note_error
        self._held: dict[Kind, dict[ObjectRef, _Read]] = {}
        self._missing_since: dict[Kind, float] = {}
        self.gone: Callable[[ObjectRef], None] = lambda _: None
        """Told of each object that somebody deleted."""
        self._due = anyio.Event()

    def plain(self, ref: ObjectRef) -> Plain | None:
        """An object as the server has it; None when there is none."""
        for held in self._held.values():
            if ref in held:
                return held[ref].plain
        return None

    async def run(self) -> None:
        """Until cancelled. While the server is away what it said counts."""
        async with anyio.create_task_group() as tasks:
            for kind in READ:
                tasks.start_soon(self._follow, kind)
            await self._tell()

    async def _tell(self) -> None:
        last: Objects | None = None
        while True:
            await self._due.wait()
            await anyio.sleep(SETTLE_S)
            self._due = anyio.Event()
            if len(self._held) == len(READ) and (found := self._objects()) != last:
                last = found
                self._changed(found)

    def _objects(self) -> Objects:
        objects, errors = list[Object](), list[str]()
        gateways = [ref for held in self._held.values() for ref in held if ref.kind == Gateway.__name__]
        for ref, each in sorted(pair for held in self._held.values() for pair in held.items()):
            if each.error:
                errors.append(each.error)
            if each.object is not None:
                objects.append(each.object)
            elif (found := _in_place_of(ref, each.plain, gateways)) is not None:
                objects.append(found)
        return Objects.of(objects, self._domain, errors=errors, classes=CLUSTER_CLASSES)

    async def _follow(self, kind: Kind) -> None:
        told, wait_s = "", RETRY_S
        while True:
            try:
                async for is_listed in self._changes(kind):
                    self._due.set()
                    if not is_listed:
                        told, wait_s = "", RETRY_S
            except TimeoutError:
                continue  # a quiet one
            except FAILURES as error:
                if told != repr(error):
                    told = repr(error)
                    self._note_error("api_server_not_followed", kind=kind.name, error=error)
            await anyio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)

    async def _changes(self, kind: Kind) -> AsyncIterator[bool]:
        """Takes a list (true), then what changes. TimeoutError: it is to be listed anew.

        A server that starts may not know yet what it has: its policies would be gone meanwhile.
        """
        missing: httpx2.HTTPStatusError | None = None
        for version in kind.versions:
            found = resource(kind, version)
            listed = self._client.list(found, chunk_size=CHUNK, **everywhere(found))
            try:
                self._take_all(kind, [each async for each in listed])
            except httpx2.HTTPStatusError as error:
                if error.response.status_code == NOT_FOUND:
                    missing = error
                    continue
                is_forbidden = error.response.status_code == FORBIDDEN
                if is_forbidden and kind.is_optional and kind not in self._held:
                    effect = "none counts: what they are for is spoken to as it is"
                    self._note_error("kind_not_followed", kind=kind.name, effect=effect, error=error)
                    break
                raise
            self._missing_since.pop(kind, None)
            yield True
            watch = self._client.watch(
                found, resource_version=listed.resourceVersion, server_timeout=WATCH_S, **everywhere(found)
            )
            events = aiter(watch)
            while True:
                with anyio.fail_after(SILENCE_S):
                    event, plain = await anext(events)
                if event in _EVENTS:
                    self._take(kind, plain, is_gone=event == "DELETED")
                    yield False
        if missing is not None and self._held.get(kind):
            since = self._missing_since.setdefault(kind, time.monotonic())
            if time.monotonic() - since < GONE_S:
                raise missing
        self._take_all(kind, [])
        yield True
        await anyio.sleep(MISSING_S)

    def _take_all(self, kind: Kind, listed: Iterable[Mapping[str, Any]]) -> None:
        before = self._held.get(kind, {})
        self._held[kind] = {}
        for plain in listed:
            ref = _ref(kind, plain)
            self._held[kind][ref] = _read(kind, ref, dict(plain), before.get(ref))
        for ref in before.keys() - self._held[kind].keys():
            self.gone(ref)

    def _take(self, kind: Kind, plain: Mapping[str, Any], *, is_gone: bool) -> None:
        ref, held = _ref(kind, plain), self._held[kind]
        if is_gone:
            held.pop(ref, None)
            self.gone(ref)
        else:
            held[ref] = _read(kind, ref, dict(plain), held.get(ref))


def _ref(kind: Kind, plain: Mapping[str, Any]) -> ObjectRef:
    metadata = plain["metadata"]
    return ObjectRef(kind.name, metadata.get("namespace", ""), metadata["name"])


def _read(kind: Kind, ref: ObjectRef, plain: Plain, before: _Read | None) -> _Read:
    version = plain["metadata"].get("resourceVersion", "")
    if before is not None and before.version == version:
        return before
    try:
        found = from_plain(plain, KINDS[kind.group, kind.name])
    except msgspec.ValidationError as error:
        return _Read(plain, version, before.object if before else None, f"{ref}: {error}")
    if ref_of(found) != ref:
        return _Read(plain, version, None, f"{ref}: is read as {ref_of(found)}")
    unknown = unknown_fields(plain, type(found))
    return _Read(plain, version, found, f"{ref}: not known here: {', '.join(unknown)}" if unknown else "")


def _in_place_of(ref: ObjectRef, plain: Plain, gateways: Iterable[ObjectRef]) -> Object | None:
    """What an object that never could be read is taken for, if it may guard something."""
    match ref.kind:
        case AuthorizationPolicy.__name__:
            return _refusing(ref, plain, gateways)
        case RequestAuthentication.__name__:
            # Whose headers, which a token is to fill, anybody could.
            own = ObjectRef(AuthorizationPolicy.__name__, ref.namespace, f"unread-{ref.name}"[:_NAME_MAX])
            return _refusing(own, plain, gateways)
        case DestinationRule.__name__:
            return _closing(ref, plain)
        case BackendTLSPolicy.__name__:
            return _closing_by_policy(ref, plain)
    return None


def _refusing(ref: ObjectRef, plain: Plain, gateways: Iterable[ObjectRef]) -> Object:
    """A policy that refuses everybody at the targets that can be read.

    If none can, at all waypoints of its namespace.
    """
    own = [one for one in gateways if one.namespace == ref.namespace]
    named = _targets(plain)
    targets = _readable(named, partial(_denial, ref))
    if named and not targets:
        targets = [{"group": GATEWAY_GROUP, "kind": one.kind, "name": one.name} for one in own]
    return _denial(ref, targets)


def _targets(plain: Plain) -> list[Any]:
    said = plain.get("spec")
    if not isinstance(said, dict):
        return []
    named = said.get("targetRefs") or ([said["targetRef"]] if said.get("targetRef") else [])
    return named if isinstance(named, list) else [named]


def _closing_by_policy(ref: ObjectRef, plain: Plain) -> Object:
    """A BackendTLSPolicy for the targets that can be read, which nobody can be checked by."""

    def made(targets: list[Any]) -> Object:
        metadata = {"name": ref.name, "namespace": ref.namespace}
        return from_plain({"metadata": metadata, "spec": {"targetRefs": targets}}, BackendTLSPolicy)

    return made(_readable(_targets(plain), made))


def _closing(ref: ObjectRef, plain: Plain) -> Object | None:
    """What a rule that cannot be read and speaks of TLS is taken for: its host is not spoken to."""
    said = plain.get("spec")
    if not isinstance(said, dict) or '"tls"' not in json.dumps(said, default=str):
        return None
    tls = {"mode": TLSMode.MUTUAL.value}  # which nobody is spoken to in, here
    metadata = {"name": ref.name, "namespace": ref.namespace}
    spec = {"host": said.get("host"), "trafficPolicy": {"tls": tls}}
    try:
        return from_plain({"metadata": metadata, "spec": spec}, DestinationRule)
    except msgspec.ValidationError:
        return None


def _denial(ref: ObjectRef, targets: list[Any]) -> Object:
    spec = {"action": Action.DENY.value, "rules": [{}], "targetRefs": targets}
    metadata = {"name": ref.name, "namespace": ref.namespace}
    return from_plain({"metadata": metadata, "spec": spec}, AuthorizationPolicy)


def _readable(targets: list[Any], made: Callable[[list[Any]], Object]) -> list[Any]:
    """Those that an object which is made for them takes."""
    found = []
    for one in targets:
        with contextlib.suppress(msgspec.ValidationError):
            made([one])
            found.append(one)
    return found
