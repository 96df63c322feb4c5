"""Wires waypoint_mgr: a folder or API server -> waypoints, their instances; the bus -> their configuration.

An Envoy gets its configuration by ADS and goes on with what it has while this process, map_writer or the
bus is away.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
import structlog

from pykmesh.bus import Bus, BusUnavailableError, Headers
from pykmesh.contracts import messages
from pykmesh.contracts.enrollment import Action, EnrollmentError, ask_for_cgroup
from pykmesh.contracts.messages import ContractError, MapReport, Subject
from pykmesh.contracts.settings import WaypointMgrSettings
from pykmesh.contracts.waypoints import (
    MeshService,
    WaypointsReply,
    WaypointsRequest,
    is_workload,
)
from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from pykmesh.process import Runtime
from services.waypoint_mgr import announce, fleet, principals, tls
from services.waypoint_mgr.ads import AdsServer, NodeStatus
from services.waypoint_mgr.announce import Announced, Announcements, Announcer, Said
from services.waypoint_mgr.attachments import Condition, listeners_of
from services.waypoint_mgr.configurations import Configurations
from services.waypoint_mgr.fleet import Fleet, Member
from services.waypoint_mgr.instances import InstanceError, refusal
from services.waypoint_mgr.keys import Keys, KeysError
from services.waypoint_mgr.policies import names_in, unenforced
from services.waypoint_mgr.requests import Reporter
from services.waypoint_mgr.root_files import RootFiles
from services.waypoint_mgr.routes import ACCESS_LOG, Configuration
from services.waypoint_mgr.scaling import SCALING, policy_of
from services.waypoint_mgr.source import Objects, mesh_name, watch
from services.waypoint_mgr.spans import PERCENT, spans_of
from services.waypoint_mgr.tokens import bootstrap_with
from services.waypoint_mgr.unused import unused

log = structlog.get_logger(__name__)

TICK_S: Final = 1.0
ASK_S: Final = 10.0
"""The mesh is asked for at least so often: a report that says of a change can be lost."""
SETTLE_S: Final = 0.02
"""Changes that come this soon after one another are taken together."""
ENROLL_S: Final = 5.0
RETRY_S: Final = 0.1
KUBECONFIG_S: Final = 5.0
PAGE_BYTES: Final = 32 * 1024
"""Of names that the mesh is asked for: what is said of each is much longer."""
OURS: Final = "pykmesh.io/"
ANNOTATIONS: Final = {ACCESS_LOG, principals.FORWARD, PERCENT, *SCALING}
"""Of Gateways."""


class WaypointMgr:
    """What shall be, and the loop that makes it so."""

    def __init__(self, runtime: Runtime[WaypointMgrSettings], ads: AdsServer) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._ads = ads
        self.members: Fleet
        self.configurations: Configurations
        self.keys = Keys(self.wake, check=self._check_keys)
        self.root_files = RootFiles(self.wake)
        self.announcer: Announcer = Announcements(runtime.settings.waypoints_dir)
        self._objects: Objects | None = None
        self._errors: tuple[str, ...] = ()
        """What is wrong in the folder."""
        self._mesh: WaypointsReply | None = None
        self._report = ("", -1)
        self._mesh_is_due = True
        """What map_writer says of the mesh is to be asked for anew."""
        self._written: Mapping[str, bytes] | None = None
        self._nameless = list[str]()
        self.is_enrolled = False
        """Connections to instances are told what they are for."""
        self._due = anyio.Event()

    def wake(self) -> None:
        self._due.set()

    async def _check_keys(self, keys: str) -> None:
        """One set that an Envoy refuses would cost its waypoint more than that set."""
        try:
            why = await refusal(bootstrap_with(keys))
        except (InstanceError, OSError) as error:
            log.info("keys_not_checked", error=str(error))
            return
        if why:
            raise KeysError(f"Envoy refuses them: {why}")

    def configured(self, objects: Objects) -> None:
        """From the source. Nothing is done until it was whole once: a policy may be in what is missing.

        And nothing that guards goes while it is not whole.
        """
        self._errors = objects.errors
        if self._objects is None and not objects.is_known:
            for error in objects.errors:
                self._runtime.note_error("configuration_not_whole", error=error)
            return
        if self._objects is not None and not objects.is_whole:
            objects = objects.with_guards_of(self._objects)
        self._objects = objects
        used = (each for each in objects.authentications if each.services or each.waypoints or each.classes)
        self.keys.want((each.ref.namespace, rule) for each in used for rule in each.spec.jwt_rules)
        roots = {path for each in objects.destinations for path in tls.files(each.spec)}
        self.root_files.want(roots | ({tls.SYSTEM_ROOTS} if objects.backend_tls else set()))
        self._mesh_is_due = True
        self._runtime.readiness.done("configuration")
        self.wake()

    async def reported(self, data: bytes, _: Headers) -> None:
        """From map_writer: the mesh may have changed."""
        try:
            report = messages.decode(MapReport, data)
        except ContractError as error:
            self._runtime.note_error("report_not_understood", error=error)
            return
        if self._report != (report.epoch, report.applied_seq):
            self._report = report.epoch, report.applied_seq
            self._mesh_is_due = True
            self.wake()

    async def run(self) -> None:
        """Until cancelled."""
        asked = 0.0
        while True:
            with anyio.move_on_after(TICK_S):
                await self._due.wait()
                await anyio.sleep(SETTLE_S)
            self._due = anyio.Event()
            if time.monotonic() - asked > ASK_S:
                self._mesh_is_due, asked = True, time.monotonic()
            if self._objects is not None:
                await self._reconcile(self._objects)

    async def _reconcile(self, objects: Objects) -> None:
        waypoints = objects.waypoints.items()
        self.members.want({name: policy_of(each.metadata.annotations)[0] for name, each in waypoints})
        if self._mesh_is_due:
            self._mesh_is_due = False  # a report that comes meanwhile makes it so again
            self._mesh_is_due |= not await self._ask(objects)
        self.configurations.follow(objects, self._mesh)
        self._announce(objects)
        await self.configurations.keep_good(objects.waypoints)

    async def _ask(self, objects: Objects) -> bool:
        """True when it was answered; what is not stays as it was known."""
        bus = self._runtime.bus
        if bus is None:
            return False
        if not objects.waypoints:
            return True
        namespaces = sorted(set().union(*map(objects.namespaces_of, objects.waypoints.values())))
        of_workloads = [each for each in objects.waypoints.values() if each.is_for_workloads]
        names = names_in(objects.policies)
        request = WaypointsRequest(
            messages.VERSION,
            [*objects.waypoints],
            self._backends(objects),
            namespaces,
            sorted(names.namespaces),
            sorted(names.accounts),
            sorted(self._behind(objects, with_subsets=True)),
            sorted(set().union(*map(objects.namespaces_of, of_workloads))),
            any(principals.is_forwarded(each.metadata.annotations) for each in objects.waypoints.values()),
        )
        try:
            reply = await _ask_in_pages(bus, request)
        except (BusUnavailableError, ContractError) as error:
            log.info("mesh_awaited", error=str(error))
            return False
        if reply.is_synced:
            await self._write_names(reply.principals if request.with_principals else None)
            mesh = msgspec.structs.replace(reply, principals={})
            self._mesh = self._mesh if self._mesh == mesh else mesh
        return reply.is_synced

    async def _write_names(self, found: Mapping[str, bytes] | None) -> None:
        """None where nobody wants them."""
        if found == self._written:
            return
        self._written, left_out = None, list[str]()
        try:
            if found is not None:
                left_out = await anyio.to_thread.run_sync(principals.write, self.configurations.names, found)
        except OSError as error:
            self._runtime.note_error("names_not_written", error=error)
            return
        self._written = found
        if left_out != self._nameless:
            self._nameless = left_out
            for name in left_out:
                log.warning("name_not_forwarded", principal=name, why="no SPIFFE name, or ids of another's")

    def _backends(self, objects: Objects) -> list[str]:
        """The services that routes name, whether they are there or not, and the waypoints' own."""
        domain = self._settings.cluster_domain
        refs = [(route, ref) for route in objects.routes for ref in route.spec.backends]
        found = dict.fromkeys(
            mesh_name(ref.namespace or route.namespace, ref.name, domain)
            for route, ref in refs
            if not ref.is_hostname
        )
        hosts = {ref.name for _, ref in refs if ref.is_hostname}
        found |= dict.fromkeys(name for name in objects.services if name.partition("/")[2] in hosts)
        found |= dict.fromkeys(self._behind(objects))
        return [*{**found, **dict.fromkeys(objects.waypoints)}]

    @staticmethod
    def _behind(objects: Objects, *, with_subsets: bool = False) -> Iterator[str]:
        """What VirtualServices lead to: a host of any namespace may be meant."""
        named = [pair for each in objects.virtuals for pair in each.backends(with_subsets=with_subsets)]
        hosts = {host for _, host in named}
        yield from dict.fromkeys(name for name, _ in named)
        yield from (name for name in objects.services if name.partition("/")[2] in hosts)

    def _announce(self, objects: Objects) -> None:
        """Nothing is taken back before it is known what runs."""
        conditions: dict[ObjectRef, list[Condition]] = {}
        if objects.waypoints.keys() <= self.configurations.found.keys():  # else it is not known what is said
            conditions = {route.ref: [] for route in objects.routes}
        for found in self.configurations.found.values():
            for condition in found.conditions:
                conditions.setdefault(condition.of, []).append(condition)
        known = {each.name: each for each in self._mesh.services} if self._mesh else {}
        waypoints = tuple(
            self._announced(name, each, known.get(name), objects) for name, each in objects.waypoints.items()
        )
        try:
            self.announcer.say(Said(waypoints, {ref: tuple(said) for ref, said in conditions.items()}))
        except OSError as error:
            self._runtime.note_error("instances_not_announced", error=error)

    def _announced(
        self, name: str, waypoint: Gateway, own: MeshService | None, objects: Objects
    ) -> Announced:
        """`own`: its Service, as the mesh knows it."""
        places = self.members.places(name) if self.is_enrolled else None
        manifests = None if places is None else announce.objects(waypoint, places)
        known = {(e.address, e.port) for port in own.ports for e in port.endpoints} if own else set()
        is_reachable = any((place.address, place.port) in known for place in places or ())
        said, listeners = self.configurations.found.get(name), None
        if said is not None:
            listeners = listeners_of(waypoint, said.conditions, objects.namespaces)
        return Announced(
            ref_of(waypoint),
            waypoint.metadata.uid,
            name.partition("/")[2],
            manifests,
            is_reachable,
            listeners,
        )

    @property
    def has_waypoints(self) -> bool:
        return self._objects is not None and bool(self._objects.waypoints)

    def status(self) -> dict[str, Any]:
        objects, without_address = self._objects or Objects(), self._without_address()
        reached = {name: {*users} - without_address for name, users in self._users().items()}
        return {
            "waypoints": [
                self._waypoint(name, found, without_address)
                for name, found in sorted(objects.waypoints.items())
            ],
            "policies_unenforced": [
                {"policy": str(ref), "why": why} for ref, why in unenforced(objects, reached).items()
            ],
            "unused": [
                {"object": str(ref), "why": why} for ref, why in self._unused(objects, reached).items()
            ],
            "manifest_errors": list(self._errors),
            "kinds_ignored": list(objects.ignored),
            "names_not_forwarded": self._nameless,
            "kubeconfig": self._settings.kubeconfig,
            "config_dir": str(self._settings.config_dir.resolve()),
        }

    def _unused(self, objects: Objects, reached: Mapping[str, set[str]]) -> dict[ObjectRef, str]:
        """Nothing while it is not known what there is."""
        if self._mesh is None:
            return {}
        known = [each.name for each in self._mesh.services]
        return unused(objects, set().union(*reached.values()), known, self._settings.cluster_domain)

    def _without_address(self) -> set[str]:
        """Services and workloads that nobody reaches at an address of theirs: headless services, say."""
        found = self._mesh.services if self._mesh else ()
        return {each.name for each in found if not (each.owned if is_workload(each.name) else each.vips)}

    def _users(self) -> dict[str, list[str]]:
        """Of each waypoint, the services that go by way of it."""
        return self._mesh.users if self._mesh else {}

    def _waypoint(self, name: str, gateway: Gateway, without_address: set[str]) -> dict[str, Any]:
        found = self.configurations.found.get(name, Configuration())
        members = [member for member in self.members.members.values() if member.waypoint == name]
        states = self._ads.status()
        group = self.members.groups.get(name)
        users = set(self._users().get(name, ()))
        asking = {user for user in users if is_workload(user)}
        services = users - asking
        return {
            "name": f"{gateway.namespace}/{gateway.name}",
            "class": gateway.spec.gateway_class_name,
            "services": sorted(services - without_address),
            "services_unguarded": sorted(services & without_address),
            "workloads": sorted(asking - without_address),
            "workloads_unguarded": sorted(asking & without_address),
            "instances": [_instance(member, states.get(member.name)) for member in members],
            "routes": [_told("route", condition) for condition in found.conditions],
            "policies": [_told("policy", condition) for condition in found.policies],
            "virtual_services": [_told("virtual_service", condition) for condition in found.virtuals],
            "authentications": [_told("authentication", condition) for condition in found.authentications],
            "destinations": [_told("destination", condition) for condition in found.destinations],
            "conflicts": [*self._anothers(name), *found.conflicts],
            "reduced": self.configurations.reduced.get(name, ""),
            "scaling": group.status() if group else None,
            "namespaces_turned_away": sorted((self._objects or Objects()).turned_away(gateway)),
            "annotations_misread": [
                *gateway.misread,
                *_unknown_annotations(gateway),
                *policy_of(gateway.metadata.annotations)[1],
                *spans_of(gateway.metadata.annotations, self._settings.otlp_endpoint)[1],
                *found.misread,
            ],
        }

    def _anothers(self, name: str) -> list[str]:
        if self._objects is None or not self._objects.is_anothers(name):
            return []
        return [f"{name} is a Service of its own: what would go by way of the waypoint is refused"]


async def _ask_in_pages(bus: Bus, request: WaypointsRequest) -> WaypointsReply:
    """Whatever tenants name, no message is larger than the bus takes."""

    async def asked(page: WaypointsRequest) -> WaypointsReply:
        return messages.decode(WaypointsReply, await bus.request(Subject.WAYPOINTS, messages.encode(page)))

    first, *rest = request.pages(PAGE_BYTES)
    found = await asked(first)
    for page in rest:
        found = found.with_page(await asked(page))
    return found


def _unknown_annotations(gateway: Gateway) -> Iterator[str]:
    """Of ours those that there are not, or that are neither true nor false."""
    said = gateway.metadata.annotations
    for name in sorted(said):
        if name.startswith(OURS) and name not in ANNOTATIONS:
            yield f"{name}: there is no such annotation"
    if said.get(ACCESS_LOG, "false") not in ("true", "false"):
        yield f"{ACCESS_LOG} is {said[ACCESS_LOG]!r}, neither true nor false: nothing is logged"


def _instance(member: Member, state: NodeStatus | None) -> dict[str, Any]:
    """What it refuses for reasons of its own is its error."""
    own = [one.message for one in state.refusals if one.is_its_own] if state else []
    return {**member.status(), "error": member.error or "; ".join(own), "configuration": state}


def _told(what: str, condition: Condition) -> dict[str, str]:
    at = [str(condition.port)] if condition.port else []
    at += [condition.section] if condition.section else []
    return {
        what: str(condition.of),
        "parent": " at ".join([str(condition.parent), *at]),
        "type": condition.type,
        "status": str(condition.status),
        "reason": condition.reason,
        "message": condition.message,
    }


async def run(runtime: Runtime[WaypointMgrSettings]) -> None:
    """Runs until cancelled; Envoys run on."""
    settings = runtime.settings
    runtime.readiness.wait_for("configuration")
    settings.envoys_dir.mkdir(parents=True, exist_ok=True)
    ads = AdsServer()
    ads_socket = settings.envoys_dir / "ads.sock"
    manager, reporter = WaypointMgr(runtime, ads), Reporter(runtime.note_error)
    members = Fleet(
        fleet.Settings(
            envoys_dir=settings.envoys_dir,
            cgroup=settings.waypoint_cgroup,
            netns=settings.waypoint_netns,
            address=settings.waypoint_address,
            first_port=settings.waypoint_port,
            ads_socket=ads_socket,
            enroll_socket=settings.enroll_socket,
        ),
        manager.wake,
        reporter.last_words,
        ads.has_taken,
    )
    manager.members = members
    configurations = manager.configurations = Configurations(
        settings, ads, members, manager.keys, manager.root_files, manager.wake, runtime.note_error
    )
    runtime.details = manager.status
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ads.serve, ads_socket, manager.wake)
        await tasks.start(members.run)
        await tasks.start(configurations.run)
        tasks.start_soon(_enroll, settings, manager)
        if settings.kubeconfig:
            tasks.start_soon(_follow_cluster, settings, manager, runtime.note_error)
        else:
            poll_s = settings.poll_ms / 1000
            keep = settings.envoys_dir / fleet.KEPT
            domain = settings.cluster_domain
            tasks.start_soon(watch, settings.config_dir, keep, domain, poll_s, manager.configured)
        tasks.start_soon(manager.run)
        tasks.start_soon(manager.keys.run)
        tasks.start_soon(manager.root_files.run)
        tasks.start_soon(reporter.run, members.served)
        bus = await runtime.connect_bus()
        reporter.bus = bus
        await bus.subscribe(Subject.MAP_REPORT, manager.reported)
        await anyio.sleep_forever()


async def _follow_cluster(
    settings: WaypointMgrSettings, manager: WaypointMgr, note_error: Callable[..., None]
) -> None:
    """Until cancelled. The library is loaded by those alone who have a cluster."""
    from services.waypoint_mgr.cluster import CONNECT_FAILURES, Cluster, connect  # noqa: PLC0415
    from services.waypoint_mgr.cluster_writer import ClusterWriter  # noqa: PLC0415

    while True:
        try:
            client = connect(settings.kubeconfig)
            break
        except CONNECT_FAILURES as error:
            note_error("kubeconfig_not_read", kubeconfig=settings.kubeconfig, error=error)
            await anyio.sleep(KUBECONFIG_S)
    cluster = Cluster(client, settings.cluster_domain, manager.configured, note_error)
    node = settings.node_name or socket.gethostname()
    manager.announcer = writer = ClusterWriter(client, cluster, node, note_error)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster.run)
        tasks.start_soon(writer.run)


async def _enroll(settings: WaypointMgrSettings, manager: WaypointMgr) -> None:
    """Again and again: it may have been undone, and to ask for what is there costs nothing."""
    told, netns = "", settings.waypoint_netns or Path("/proc/self/ns/net")
    while True:
        await anyio.sleep(ENROLL_S if manager.is_enrolled else RETRY_S)
        if not manager.has_waypoints:
            continue
        try:
            settings.waypoint_cgroup.mkdir(exist_ok=True)
            await anyio.to_thread.run_sync(
                ask_for_cgroup,
                settings.enroll_socket,
                Action.ENROLL_WAYPOINT,
                settings.waypoint_cgroup,
                netns,
            )
        except (EnrollmentError, OSError) as error:
            if told != str(error):
                told = str(error)
                log.info("waypoints_not_enrolled", error=told)
            continue
        if not manager.is_enrolled:
            manager.is_enrolled, told = True, ""
            manager.wake()
