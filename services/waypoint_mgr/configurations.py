"""What the Envoys of each waypoint are told, and whose objects they do not take.

Each waypoint's configuration is made by itself, a few at once in threads, and sent when it is made. What its
Envoys refuse, or nothing can be made of, is looked into (`blame`); meanwhile they have what they had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
import structlog
from anyio.abc import TaskGroup

from pykmesh.contracts.settings import WaypointMgrSettings
from pykmesh.contracts.waypoints import MeshService, WaypointsReply, is_workload, namespace_of
from pykmesh.manifests.objects import Gateway, ObjectRef
from services.waypoint_mgr import fleet, principals
from services.waypoint_mgr.ads import AdsServer, NodeStatus
from services.waypoint_mgr.attachments import Condition
from services.waypoint_mgr.blame import EACH_MAX, RefusalWithout, bootstrap_of, find_guilty
from services.waypoint_mgr.encode import Resources, resources
from services.waypoint_mgr.envoy import Json
from services.waypoint_mgr.fleet import Fleet
from services.waypoint_mgr.instances import refusal
from services.waypoint_mgr.keys import Keys
from services.waypoint_mgr.last_good import FILE, LastGood
from services.waypoint_mgr.policies import Clients
from services.waypoint_mgr.root_files import RootFiles
from services.waypoint_mgr.routes import Configuration, Wanted, translate
from services.waypoint_mgr.source import Objects, Route, Virtual
from services.waypoint_mgr.spans import spans_of

log = structlog.get_logger(__name__)

PORT_RETRY_S: Final = 2.0
WHY_MAX: Final = 500
ASKING_S: Final = 20.0
"""What was found until then counts."""
ACQUIT_S: Final = 60.0
THREADS: Final = 2
"""Configurations that are made at once: who waits is not the loop."""


class Configurations:
    """`run` first, then `follow` again and again: it returns at once."""

    def __init__(
        self,
        settings: WaypointMgrSettings,
        ads: AdsServer,
        members: Fleet,
        keys: Keys,
        root_files: RootFiles,
        wake: Callable[[], None],
        note_error: Callable[..., None],
    ) -> None:
        """`wake`: `follow` is due. `note_error`: an event and its data."""
        self._settings = settings
        self._ads = ads
        self._members = members
        self._keys = keys
        self._root_files = root_files
        self._wake = wake
        self._note_error = note_error
        self.names = settings.envoys_dir.absolute() / fleet.NAMES
        """Where those of clients are, for scripts in Envoys."""
        self._tasks: TaskGroup
        self._mesh: WaypointsReply | None = None
        self.found: dict[str, Configuration] = {}
        """By waypoint, what was made last."""
        self._good = LastGood(settings.envoys_dir / FILE)
        """By waypoint: one that does not take a route has no opinion of it."""
        self._made_of: dict[str, tuple[object, ...]] = {}
        self._making: set[str] = set()
        self.reduced: dict[str, str] = {}
        """Waypoints that get less, since nobody is to blame for what their Envoys refuse; and why."""
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

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            await anyio.sleep_forever()

    def follow(self, objects: Objects, mesh: WaypointsReply | None) -> None:
        """Begins to make what is to be made anew. `mesh` None: it is not known yet."""
        self._mesh = mesh
        self._look_for_refusals(objects)
        self._look_for_ports()
        for name, waypoint in objects.waypoints.items() if mesh is not None else ():
            made_of = self._make_of(name, objects)
            if name not in self._making and self._made_of.get(name) != made_of:
                self._making.add(name)
                self._tasks.start_soon(self._make, name, waypoint, objects, made_of)
        self._forget(objects)

    async def keep_good(self, waypoints: Collection[str]) -> None:
        """What Envoys took, for who comes after."""
        if self._good.is_due(waypoints):
            try:
                await anyio.to_thread.run_sync(self._good.keep, waypoints)
            except (OSError, TypeError, ValueError, RecursionError) as error:
                self._note_error("last_good_not_kept", error=error)

    def _make_of(self, name: str, objects: Objects) -> tuple[object, ...]:
        """All that a waypoint's configuration is made of now."""
        members = sorted(each.name for each in self._members.members.values() if each.waypoint == name)
        blamed, reduced = {**self._blamed.get(name, {})}, name in self.reduced
        keys = self._keys.found, dict(self._keys.errors)
        return objects, self._mesh, members, reduced, blamed, keys, self._root_files.roots

    async def _make(
        self, name: str, waypoint: Gateway, objects: Objects, made_of: tuple[object, ...]
    ) -> None:
        try:
            if self._mesh is not None:
                await self._configure(name, waypoint, objects, self._mesh)
            self._made_of[name] = made_of
        finally:
            self._making.discard(name)
            self._wake()

    def _look_for_refusals(self, objects: Objects) -> None:
        """What an Envoy refuses holds up all that comes after: it is found out what that is for.

        What they take is what is right, for when something is wrong.
        """
        made_of = objects, self._keys.found, self._root_files.roots
        if self._reduced_of != made_of:
            self.reduced, self._reduced_of = {}, made_of
        states: dict[str, list[NodeStatus]] = {name: [] for name in objects.waypoints}
        for node_id, state in self._ads.status().items():
            if (member := self._members.members.get(node_id)) is not None:
                states.setdefault(member.waypoint, []).append(state)
        for name, of_it in states.items():
            if self._made_of.get(name) != self._make_of(name, objects):
                continue  # what they say is of another
            if whys := [one.message for state in of_it for one in state.refusals if not one.is_its_own]:
                self._suspect(name, "; ".join(whys), objects)
            elif name in self._right and (not of_it or any(state.is_current for state in of_it)):
                self._good.note(name, self._right.pop(name))
            elif self._may_acquit(name):
                self._asking.add(name)
                self._tasks.start_soon(self._acquit, name, objects)

    def _may_acquit(self, name: str) -> bool:
        may = name not in self._asking and bool(self._blamed.get(name))
        return may and time.monotonic() - self._asked_at.get(name, 0.0) > ACQUIT_S

    def _look_for_ports(self) -> None:
        """An instance whose port is somebody else's gets its listener again: the port may be free by now."""
        for node_id, state in self._ads.status().items():
            refused_at = [one.at for one in state.refusals if one.is_its_own]
            if refused_at and time.time() - max(refused_at) > PORT_RETRY_S:
                self._ads.retry(node_id)

    def _suspect(self, name: str, why: str, objects: Objects) -> None:
        """Its Envoys do not take what was made, or nothing can be made: they have what they had."""
        if name not in self.reduced and name not in self._asking:
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
            self._note_error("object_refused", waypoint=name, object=ref, error=because)
        if not found and self._reduced_of == (objects, self._keys.found, self._root_files.roots):
            self.reduced[name] = why
            self._note_error("configuration_reduced", waypoint=name, error=why)
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
        self._wake()

    def _asked(
        self, name: str, objects: Objects, *, but: ObjectRef | None = None
    ) -> tuple[list[ObjectRef], RefusalWithout]:
        """Who may be to blame, and what asks an Envoy. `but`: that is not to blame."""
        if self._mesh is None or name not in objects.waypoints:
            return [], _nobody_asks
        translated = self._translator(name, objects.waypoints[name], objects, self._mesh)
        wanted = self._wanted(name, objects, but=but)

        def made(without: Collection[ObjectRef]) -> Json | str:
            """Or why nothing can be."""
            try:
                found = translated(wanted.blaming({**dict.fromkeys(without, ""), **wanted.blamed}))
                resources(found, self._members.address, 1)
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

    async def _configure(self, name: str, waypoint: Gateway, objects: Objects, mesh: WaypointsReply) -> None:
        """Where nothing can be made of what there is, it stays as it was, and others go on."""
        members = [member for member in self._members.members.values() if member.waypoint == name]
        made: dict[str, Resources] = {}
        try:
            translated = self._translator(name, waypoint, objects, mesh)
            wanted = self._wanted(name, objects)
            found, right = await anyio.to_thread.run_sync(
                self._translate, name, objects, wanted, translated, limiter=self._threads
            )
            for member in members:
                made[member.name] = await anyio.to_thread.run_sync(
                    resources, found, self._members.address, member.port, limiter=self._threads
                )
        except Exception as error:  # noqa: BLE001  (what it is is told)
            self._note_error("configuration_not_made", waypoint=name, error=_why(error))
            self._suspect(name, _why(error), objects)
            return
        for member_name, found_resources in made.items():
            self._ads.publish(member_name, found_resources)
        self.found[name], self._right[name] = found, right

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
        family = 6 if ":" in self._members.address else 4
        clients = Clients(mesh.namespace_ids, mesh.account_ids, family, mesh.service_secret)
        names = self.names if principals.is_forwarded(waypoint.metadata.annotations) else None
        domain = self._settings.cluster_domain
        spans, _ = spans_of(waypoint.metadata.annotations, self._settings.otlp_endpoint)

        def translated(wanted: Wanted) -> Configuration:
            return translate(waypoint, users, known, objects.services, wanted, domain, clients, spans, names)

        return translated

    def _said(self, objects: Objects) -> dict[ObjectRef, object]:
        """What each object comes to, with the keys and roots that it names."""
        keys, roots = self._keys.found, self._root_files.roots
        of_tls = {each.ref for each in objects.destinations} | {each.by for each in objects.backend_tls}
        found = {ref: (each, roots) if ref in of_tls else each for ref, each in objects.by_ref.items()}
        return found | {each.ref: each.with_keys(keys) for each in objects.authentications}

    def _wanted(self, name: str, objects: Objects, *, but: ObjectRef | None = None) -> Wanted:
        wanted = Wanted(
            objects.routes,
            objects.policies,
            objects.destinations,
            objects.virtuals,
            [each.with_keys(self._keys.found) for each in objects.authentications],
            self._keys.errors,
            objects.backend_tls,
            self._root_files.roots,
            namespaces=objects.namespaces,
        )
        if blamed := self._blamed.get(name):
            said = self._said(objects)
            still = {r: why for r, (then, why) in blamed.items() if r != but and said.get(r) == then}
            wanted = wanted.blaming(still)
        return wanted.reduced if name in self.reduced else wanted

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

    def _forget(self, objects: Objects) -> None:
        """What waypoints and instances left that are gone."""
        by_name: tuple[dict[str, Any], ...] = (
            self.found, self._blamed, self._made_of, self._asked_at, self._right,
        )  # fmt: skip
        for known in by_name:
            for name in known.keys() - objects.waypoints.keys():
                del known[name]
        said = self._said(objects) if any(self._blamed.values()) else {}
        for blamed in self._blamed.values():
            for ref in [ref for ref, (then, _) in blamed.items() if said.get(ref) != then]:
                del blamed[ref]
        for node_id in self._ads.status().keys() - self._members.members.keys():
            self._ads.forget(node_id)


async def _nobody_asks(_: Collection[ObjectRef]) -> str:
    """There is no waypoint any more."""
    return ""


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:WHY_MAX]


def _of(said: tuple[Condition, ...], refs: Collection[ObjectRef]) -> tuple[Condition, ...]:
    return tuple(one for one in said if one.of in refs)


def _but(said: tuple[Condition, ...], refs: Collection[ObjectRef]) -> tuple[Condition, ...]:
    return tuple(one for one in said if one.of not in refs)
