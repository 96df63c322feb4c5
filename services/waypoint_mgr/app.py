"""Wires waypoint_mgr: a folder or API server -> waypoints, their instances; the bus -> their configuration.

An Envoy gets its configuration by ADS and goes on with what it has while this process, map_writer or the
bus is away.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
import structlog
from anyio.abc import TaskGroup

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
    namespace_of,
)
from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from pykmesh.process import Runtime
from services.waypoint_mgr import announce, fleet, principals, tls
from services.waypoint_mgr.ads import AdsServer, NodeStatus
from services.waypoint_mgr.announce import Announced, Announcements, Announcer, Said
from services.waypoint_mgr.attachments import Condition, listeners_of
from services.waypoint_mgr.blame import EACH_MAX, IsTaken, bootstrap_of, find_guilty
from services.waypoint_mgr.encode import Resources, resources
from services.waypoint_mgr.envoy import Json
from services.waypoint_mgr.fleet import Fleet, Member
from services.waypoint_mgr.instances import InstanceError, refusal
from services.waypoint_mgr.keys import Keys, KeysError
from services.waypoint_mgr.last_good import FILE, LastGood
from services.waypoint_mgr.policies import Clients, names_in, unenforced
from services.waypoint_mgr.requests import Reporter
from services.waypoint_mgr.root_files import RootFiles
from services.waypoint_mgr.routes import ACCESS_LOG, Configuration, Wanted, translate
from services.waypoint_mgr.scaling import SCALING, policy_of
from services.waypoint_mgr.source import Objects, Route, Virtual, mesh_name, watch
from services.waypoint_mgr.spans import PERCENT, Spans, spans_of
from services.waypoint_mgr.tokens import bootstrap_with
from services.waypoint_mgr.unused import unused

log = structlog.get_logger(__name__)

TICK_S: Final = 1.0
PORT_RETRY_S: Final = 2.0
ASK_S: Final = 10.0
"""The mesh is asked for at least so often: a report that says of a change can be lost."""
SETTLE_S: Final = 0.02
"""Changes that come this soon after one another are taken together."""
ENROLL_S: Final = 5.0
RETRY_S: Final = 0.1
KUBECONFIG_S: Final = 5.0
WHY_MAX: Final = 500
ASKING_S: Final = 20.0
"""What was found until then counts."""
ACQUIT_S: Final = 60.0
THREADS: Final = 2
"""Configurations that are made at once: who waits is not the loop."""
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
        self.keys = Keys(self.wake, check=self._check_keys)
        self.root_files = RootFiles(self.wake)
        self.announcer: Announcer = Announcements(runtime.settings.waypoints_dir)
        self._objects: Objects | None = None
        self._errors: tuple[str, ...] = ()
        """What is wrong in the folder."""
        self._mesh: WaypointsReply | None = None
        self._configurations: dict[str, Configuration] = {}
        self._good = LastGood(self._settings.envoys_dir / FILE)
        """By waypoint: one that does not take a route has no opinion of it."""
        self._made_of: dict[str, tuple[object, ...]] = {}
        """By waypoint, what its configuration was made of."""
        self._making: set[str] = set()
        """Waypoints whose configuration is being made: none waits for another's."""
        self._reduced: dict[str, str] = {}
        """Waypoints whose Envoys refuse what was made of these objects, and why."""
        self._reduced_of: tuple[object, ...] = ()
        self._blamed: dict[str, dict[ObjectRef, tuple[object, str]]] = {}
        """By waypoint, objects that no Envoy takes, as they were then, and why."""
        self._asking: set[str] = set()
        """Waypoints of which it is being found out which objects those are."""
        self._asked_at: dict[str, float] = {}
        self._right: dict[str, dict[ObjectRef, Route | Virtual]] = {}
        """By waypoint, what is right, and no Envoy has said yet that it takes it."""
        self._threads = anyio.CapacityLimiter(THREADS)
        self._envoy_to_ask = anyio.Semaphore(1)
        self._tasks: TaskGroup
        self._report = ("", -1)
        self._mesh_is_due = True
        """What map_writer says of the mesh is to be asked for anew."""
        self._names = runtime.settings.envoys_dir.absolute() / fleet.NAMES
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
        async with anyio.create_task_group() as self._tasks:
            await self._follow()

    async def _follow(self) -> None:
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
        self._look_for_refusals(objects)
        self._look_for_ports()
        for name, waypoint in waypoints if self._mesh is not None else ():
            made_of = self._make_of(name, objects)
            if name not in self._making and self._made_of.get(name) != made_of:
                self._making.add(name)
                self._tasks.start_soon(self._make, name, waypoint, objects, made_of)
        self._forget(objects)
        self._announce(objects)
        if self._good.is_due(objects.waypoints):
            try:
                await anyio.to_thread.run_sync(self._good.keep, objects.waypoints)
            except (OSError, TypeError, ValueError, RecursionError) as error:
                self._runtime.note_error("last_good_not_kept", error=error)

    def _make_of(self, name: str, objects: Objects) -> tuple[object, ...]:
        """All that a waypoint's configuration is made of now."""
        members = sorted(each.name for each in self.members.members.values() if each.waypoint == name)
        blamed, reduced = {**self._blamed.get(name, {})}, name in self._reduced
        keys = self.keys.found, dict(self.keys.errors)
        return objects, self._mesh, members, reduced, blamed, keys, self.root_files.roots

    async def _make(
        self, name: str, waypoint: Gateway, objects: Objects, made_of: tuple[object, ...]
    ) -> None:
        try:
            if self._mesh is not None:
                await self._configure(name, waypoint, objects, self._mesh)
            self._made_of[name] = made_of
        finally:
            self._making.discard(name)
            self.wake()

    def _look_for_refusals(self, objects: Objects) -> None:
        """What an Envoy refuses holds up all that comes after: it is found out what that is for.

        What they take is what is right, for when something is wrong.
        """
        made_of = objects, self.keys.found, self.root_files.roots
        if self._reduced_of != made_of:
            self._reduced, self._reduced_of = {}, made_of
        states: dict[str, list[NodeStatus]] = {name: [] for name in objects.waypoints}
        for node_id, state in self._ads.status().items():
            if (member := self.members.members.get(node_id)) is not None:
                states.setdefault(member.waypoint, []).append(state)
        for name, of_it in states.items():
            if self._made_of.get(name) != self._make_of(name, objects):
                continue  # what they say is of another
            if whys := [one.message for state in of_it for one in state.refusals if not one.is_its_own]:
                self._suspect(name, "; ".join(whys), objects)
            elif name in self._right and (not of_it or any(state.is_current for state in of_it)):
                self._good.note(name, self._right.pop(name))
            elif self._blamed.get(name) and time.monotonic() - self._asked_at.get(name, 0.0) > ACQUIT_S:
                self._asking.add(name)
                self._tasks.start_soon(self._acquit, name, objects)

    def _look_for_ports(self) -> None:
        """An instance whose port is somebody else's gets its listener again: the port may be free by now."""
        for node_id, state in self._ads.status().items():
            refused_at = [one.at for one in state.refusals if one.is_its_own]
            if refused_at and time.time() - max(refused_at) > PORT_RETRY_S:
                self._ads.retry(node_id)

    def _suspect(self, name: str, why: str, objects: Objects) -> None:
        """Its Envoys do not take what was made, or nothing can be made: they have what they had."""
        if name not in self._reduced and name not in self._asking:
            self._asking.add(name)
            self._tasks.start_soon(self._find_guilty, name, why, objects)

    async def _find_guilty(self, name: str, why: str, objects: Objects) -> None:
        """Whose objects it is for; where that cannot be told, the waypoint gets less until they change.

        What is left is configured at once, whatever came meanwhile: who goes on writing what is wrong keeps
        nothing back that others wrote before.
        """
        found: dict[ObjectRef, str] = {}
        try:
            with anyio.move_on_after(ASKING_S):
                suspects, refusal_without = self._asked(name, objects)
                await find_guilty(suspects, refusal_without, found)
        except Exception as error:  # noqa: BLE001  (an Envoy cannot be asked: nobody is to blame)
            log.warning("nobody_blamed", waypoint=name, error=_why(error))
        said = self._said(objects)
        for ref, because in found.items():
            self._blamed.setdefault(name, {})[ref] = said[ref], because
            self._runtime.note_error("object_refused", waypoint=name, object=ref, error=because)
        if not found and self._reduced_of == (objects, self.keys.found, self.root_files.roots):
            self._reduced[name] = why
            self._runtime.note_error("configuration_reduced", waypoint=name, error=why)
        if found and self._mesh is not None and name in objects.waypoints:
            await self._configure(name, objects.waypoints[name], objects, self._mesh)
        self._answered(name)

    async def _acquit(self, name: str, objects: Objects) -> None:
        """Of those that are to blame any that is taken now that others are gone, a few of them each time."""
        blamed = self._blamed[name]
        try:
            with anyio.move_on_after(ASKING_S):
                for ref in [*blamed][:EACH_MAX]:
                    _, refusal_without = self._asked(name, objects, but=ref)
                    is_refused = bool(await refusal_without(()))
                    found = blamed.pop(ref, None)
                    if is_refused and found is not None:
                        blamed[ref] = found  # the last one now
        except Exception as error:  # noqa: BLE001  (an Envoy cannot be asked: they stay)
            log.warning("nobody_acquitted", waypoint=name, error=_why(error))
        self._answered(name)

    def _answered(self, name: str) -> None:
        """It is made anew, of what there is now; what is said of that counts."""
        self._asking.discard(name)
        self._asked_at[name] = time.monotonic()
        self._made_of.pop(name, None)
        self.wake()

    def _asked(
        self, name: str, objects: Objects, *, but: ObjectRef | None = None
    ) -> tuple[list[ObjectRef], IsTaken]:
        """Who may be to blame, and what asks an Envoy. `but`: that is not to blame."""
        if self._mesh is None or name not in objects.waypoints:
            return [], _nobody_asks
        translated = self._translator(name, objects.waypoints[name], objects, self._mesh)
        wanted = self._wanted(name, objects, but=but)

        def made(without: Collection[ObjectRef]) -> Json | str:
            """Or why nothing can be."""
            try:
                found = translated(wanted.blaming({**dict.fromkeys(without, ""), **wanted.blamed}))
                resources(found, self.members.address, 1)
                return bootstrap_of(found)
            except Exception as error:  # noqa: BLE001  (what an object makes of it the object is to blame for)
                return _why(error)

        async def refusal_without(refs: Collection[ObjectRef]) -> str:
            config = await anyio.to_thread.run_sync(made, refs, limiter=self._threads)
            if isinstance(config, str):
                return config
            async with self._envoy_to_ask:
                return await refusal(config)

        return [ref for ref in objects.by_ref if ref not in wanted.blamed], refusal_without

    def _forget(self, objects: Objects) -> None:
        """What waypoints and instances left that are gone."""
        by_name: tuple[dict[str, Any], ...] = (
            self._configurations, self._blamed, self._made_of, self._asked_at, self._right,
        )  # fmt: skip
        for known in by_name:
            for name in known.keys() - objects.waypoints.keys():
                del known[name]
        said = self._said(objects) if any(self._blamed.values()) else {}
        for blamed in self._blamed.values():
            for ref in [ref for ref, (then, _) in blamed.items() if said.get(ref) != then]:
                del blamed[ref]
        for node_id in self._ads.status().keys() - self.members.members.keys():
            self._ads.forget(node_id)

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
                left_out = await anyio.to_thread.run_sync(principals.write, self._names, found)
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

    async def _configure(self, name: str, waypoint: Gateway, objects: Objects, mesh: WaypointsReply) -> None:
        """Where nothing can be made of what there is, it stays as it was, and others go on."""
        members = [member for member in self.members.members.values() if member.waypoint == name]
        made: dict[str, Resources] = {}
        try:
            translated = self._translator(name, waypoint, objects, mesh)
            wanted = self._wanted(name, objects)
            found, right = await anyio.to_thread.run_sync(
                self._translate, name, objects, wanted, translated, limiter=self._threads
            )
            for member in members:
                made[member.name] = await anyio.to_thread.run_sync(
                    resources, found, self.members.address, member.port, limiter=self._threads
                )
        except Exception as error:  # noqa: BLE001  (what it is is told)
            self._runtime.note_error("configuration_not_made", waypoint=name, error=_why(error))
            self._suspect(name, _why(error), objects)
            return
        for member_name, found_resources in made.items():
            self._ads.publish(member_name, found_resources)
        self._configurations[name], self._right[name] = found, right

    def _translator(
        self, name: str, waypoint: Gateway, objects: Objects, mesh: WaypointsReply
    ) -> Callable[[Wanted], Configuration]:
        """Also for services that may come by way of it: their connections must find it ready for them."""
        known = {service.name: service for service in mesh.services}
        namespaces = objects.namespaces_of(waypoint)
        asking = frozenset(mesh.users.get(name, ()))

        def may_come(service: MeshService) -> bool:
            is_one = is_workload(service.name)
            if is_one and not service.owned:
                return False
            if service.name in asking:
                return True
            is_let_in = namespace_of(service.name) in namespaces and service.name not in objects.waypoints
            return is_let_in and (not is_one or waypoint.is_for_workloads)

        users = [service for service in mesh.services if may_come(service)]
        family = 6 if ":" in self.members.address else 4
        clients = Clients(mesh.namespace_ids, mesh.account_ids, family, mesh.service_secret)
        names = self._names if principals.is_forwarded(waypoint.metadata.annotations) else None
        domain, (spans, _) = self._settings.cluster_domain, self._spans(waypoint)

        def translated(wanted: Wanted) -> Configuration:
            return translate(waypoint, users, known, objects.services, wanted, domain, clients, spans, names)

        return translated

    def _said(self, objects: Objects) -> dict[ObjectRef, object]:
        """What each object comes to, with the keys and roots that it names."""
        keys, roots = self.keys.found, self.root_files.roots
        of_tls = {each.ref for each in objects.destinations} | {each.by for each in objects.backend_tls}
        found = {ref: (each, roots) if ref in of_tls else each for ref, each in objects.by_ref.items()}
        return found | {each.ref: each.with_keys(keys) for each in objects.authentications}

    def _wanted(self, name: str, objects: Objects, *, but: ObjectRef | None = None) -> Wanted:
        wanted = Wanted(
            objects.routes,
            objects.policies,
            objects.destinations,
            objects.virtuals,
            [each.with_keys(self.keys.found) for each in objects.authentications],
            self.keys.errors,
            objects.backend_tls,
            self.root_files.roots,
            namespaces=objects.namespaces,
        )
        if blamed := self._blamed.get(name):
            said = self._said(objects)
            still = {r: why for r, (then, why) in blamed.items() if r != but and said.get(r) == then}
            wanted = wanted.blaming(still)
        return wanted.reduced if name in self._reduced else wanted

    def _translate(
        self, name: str, objects: Objects, wanted: Wanted, translated: Callable[[Wanted], Configuration]
    ) -> tuple[Configuration, dict[ObjectRef, Route | Virtual]]:
        """A route that is wrong counts as it was when it was right. Also returns what is right now."""
        found = translated(wanted)
        refused = found.refused
        said: list[Route | Virtual] = [*objects.routes, *objects.virtuals]
        concerned = {condition.of for condition in (*found.conditions, *found.virtuals)}
        good = {each.ref: each for each in said if each.ref not in refused}
        before = self._good.of(name)
        blamed = [each for each in said if each.ref in wanted.blamed]
        good |= {ref: before[ref] for ref in refused if ref in before and before[ref] not in blamed}
        right = {ref: each for ref, each in good.items() if ref in concerned}
        if refused.isdisjoint(good):
            return found, right
        routes = tuple(each for each in good.values() if isinstance(each, Route))
        virtuals = tuple(each for each in good.values() if isinstance(each, Virtual))
        wanted = msgspec.structs.replace(wanted, routes=routes, virtuals=() if wanted.only_tls else virtuals)
        kept = translated(wanted)
        kept = msgspec.structs.replace(
            kept,
            conditions=_of(found.conditions, refused) + _but(kept.conditions, refused),
            virtuals=_of(found.virtuals, refused) + _but(kept.virtuals, refused),
        )
        return kept, right

    def _spans(self, waypoint: Gateway) -> tuple[Spans | None, list[str]]:
        return spans_of(waypoint.metadata.annotations, self._settings.otlp_endpoint)

    def _announce(self, objects: Objects) -> None:
        """Nothing is taken back before it is known what runs."""
        conditions: dict[ObjectRef, list[Condition]] = {}
        if objects.waypoints.keys() <= self._configurations.keys():  # else it is not known what is said
            conditions = {route.ref: [] for route in objects.routes}
        for found in self._configurations.values():
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
        said, listeners = self._configurations.get(name), None
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
        found = self._configurations.get(name, Configuration())
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
            "reduced": self._reduced.get(name, ""),
            "scaling": group.status() if group else None,
            "namespaces_turned_away": sorted((self._objects or Objects()).turned_away(gateway)),
            "annotations_misread": [
                *gateway.misread,
                *_unknown_annotations(gateway),
                *policy_of(gateway.metadata.annotations)[1],
                *self._spans(gateway)[1],
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


async def _nobody_asks(_: Collection[ObjectRef]) -> str:
    """There is no waypoint any more."""
    return ""


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:WHY_MAX]


def _of(said: tuple[Condition, ...], refs: Collection[ObjectRef]) -> tuple[Condition, ...]:
    return tuple(one for one in said if one.of in refs)


def _but(said: tuple[Condition, ...], refs: Collection[ObjectRef]) -> tuple[Condition, ...]:
    return tuple(one for one in said if one.of not in refs)


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
    runtime.details = manager.status
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ads.serve, ads_socket, manager.wake)
        await tasks.start(members.run)
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
