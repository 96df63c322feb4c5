"""Who an id or an address is: asked of map_writer in batches, kept for a while.

Owns the cache and the questions that are open. Never waits for an answer: a name is there or it is
not, and who needs it says so and comes again. An answer that has grown old is asked anew, and given
meanwhile as the best there is, so names outlive map_writer and the bus being away. An address that becomes
somebody else's is told by map_writer; whose it was before is known for what was recorded then.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, Generic, NamedTuple, TypeVar

import anyio
import structlog

from pykmesh.bus import Bus, BusUnavailableError, Headers
from pykmesh.contracts import messages
from pykmesh.contracts.messages import (
    ContractError,
    NamesChanged,
    ResolveReply,
    ResolveRequest,
    ServiceName,
    Subject,
    WorkloadName,
)
from pykmesh.kernel.records import NO_IP, Ip

log = structlog.get_logger(__name__)

FRESH_S: Final = 30.0
UNKNOWN_FRESH_S: Final = 5.0
"""For how long it is believed that nobody has this id or address."""
CACHE_MAX: Final = 65_536
WANTED_MAX: Final = 65_536
BATCH: Final = 512
"""Ids, and addresses, in one request."""
RETRY_S: Final = 0.5
BEFORE_MAX: Final = 4
"""Names that a key had before, at most."""

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")
Clock = Callable[[], float]


class Found(NamedTuple, Generic[_V]):
    """`value` may be None or old while `fresh_until` lies in the past: it has been asked for."""

    value: _V | None
    fresh_until: float


class Cache(Generic[_K, _V]):
    """The answers about one kind of key, the least recently used dropped first, and what to ask for."""

    def __init__(
        self, clock: Clock, limit: int = CACHE_MAX, on_question: Callable[[], None] = lambda: None
    ) -> None:
        self._clock = clock
        self._limit = limit
        self._on_question = on_question
        self._known: OrderedDict[_K, Found[_V]] = OrderedDict()
        self._before: dict[_K, deque[tuple[float, _V]]] = {}
        """Other names that a key had, and until when, the oldest first."""
        self._wanted: dict[_K, None] = {}
        self._asked: set[_K] = set()
        self.unasked = 0
        """Questions that were dropped because too many were open."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def open_questions(self) -> int:
        return len(self._wanted) + len(self._asked)

    @property
    def has_questions(self) -> bool:
        return bool(self._wanted)

    def find(self, key: _K) -> Found[_V]:
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            if found.fresh_until > self._clock():
                return found
        self._want(key)
        return found or Found(None, 0.0)

    def at(self, key: _K, when: float) -> _V | None:
        """Whose it was, as far as that is known."""
        earlier = (value for until, value in self._before.get(key, ()) if when < until)
        return next(earlier, None) or self.find(key).value

    def _want(self, key: _K) -> None:
        if key in self._wanted or key in self._asked:
            return
        if len(self._wanted) >= WANTED_MAX:
            self.unasked += 1
            return
        self._wanted[key] = None
        self._on_question()

    def next_questions(self) -> list[_K]:
        """The oldest open questions; each is open until it is answered or given back."""
        chosen = [key for key, _ in zip(self._wanted, range(BATCH), strict=False)]
        for key in chosen:
            del self._wanted[key]
        self._asked.update(chosen)
        return chosen

    def answer(self, keys: Iterable[_K], values: Iterable[_V | None]) -> None:
        now = self._clock()
        for key, value in zip(keys, values, strict=True):
            self._asked.discard(key)
            self._take(key, value, now)
        while len(self._known) > self._limit:
            gone, _ = self._known.popitem(last=False)
            self._before.pop(gone, None)

    def change(self, keys: Iterable[_K], values: Iterable[_V | None]) -> None:
        """Of those that are known."""
        now = self._clock()
        for key, value in zip(keys, values, strict=True):
            if key in self._known:
                self._take(key, value, now)

    def _take(self, key: _K, value: _V | None, now: float) -> None:
        was = self._known.get(key)
        if was is not None and was.value is not None and was.value != value:
            self._before.setdefault(key, deque(maxlen=BEFORE_MAX)).append((now, was.value))
        self._known[key] = Found(value, now + (UNKNOWN_FRESH_S if value is None else FRESH_S))
        self._known.move_to_end(key)

    def give_back(self, keys: Iterable[_K]) -> None:
        for key in keys:
            self._asked.discard(key)
            self._want(key)


class Names:
    """The names of service ports, and of workloads on this node's network."""

    def __init__(self, network: str, clock: Clock = time.monotonic) -> None:
        self._network = network
        self._questions = anyio.Event()
        self.services: Cache[int, ServiceName] = Cache(clock, on_question=self._note_question)
        self.workloads: Cache[Ip, WorkloadName] = Cache(clock, on_question=self._note_question)
        self.bus: Bus | None = None
        self.on_answer: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None
        self.requests = 0
        self.failures = 0
        self._error = ""
        self._tried = anyio.Event()

    def service(self, number: int) -> Found[ServiceName]:
        return self.services.find(number) if number else Found(None, float("inf"))

    def workload(self, ip: Ip) -> Found[WorkloadName]:
        return self.workloads.find(ip) if ip != NO_IP else Found(None, float("inf"))

    def service_at(self, number: int, when: float) -> ServiceName | None:
        return self.services.at(number, when) if number else None

    def workload_at(self, ip: Ip, when: float) -> WorkloadName | None:
        return self.workloads.at(ip, when) if ip != NO_IP else None

    async def changed(self, data: bytes, _: Headers) -> None:
        """From map_writer."""
        try:
            news = messages.decode(NamesChanged, data)
        except ContractError as error:
            log.error("names_not_understood", error=str(error))
            return
        found = zip(news.addresses, news.names, strict=False)
        own = {Ip(ip): name for (network, ip), name in found if network == self._network}
        self.workloads.change(own.keys(), own.values())
        self.on_change()

    def _note_question(self) -> None:
        self._questions.set()

    async def run(self, interval_s: float) -> None:
        """Asks what is open, what comes within `interval_s` together, until cancelled."""
        while True:
            await self._questions.wait()
            self._questions = anyio.Event()
            await anyio.sleep(interval_s)
            while self.services.has_questions or self.workloads.has_questions:
                await self._ask_next()

    async def _ask_next(self) -> None:
        services, addresses = self.services.next_questions(), self.workloads.next_questions()
        if not await self._ask(services, addresses):
            self.services.give_back(services)
            self.workloads.give_back(addresses)
            await anyio.sleep(RETRY_S)

    async def _ask(self, services: list[int], addresses: list[Ip]) -> bool:
        request = ResolveRequest(messages.VERSION, services, [(self._network, ip) for ip in addresses])
        self.requests += 1
        try:
            reply = await self._request(request)
        except (BusUnavailableError, ContractError) as error:
            self._note_failure(str(error))
            return False
        if self._error:
            log.info("names_found_again")
            self._error = ""
        self.services.answer(services, reply.services)
        self.workloads.answer(addresses, reply.addresses)
        self._wake()
        self.on_answer()
        return True

    async def _request(self, request: ResolveRequest) -> ResolveReply:
        if self.bus is None:
            raise BusUnavailableError("no broker yet")
        data = await self.bus.request(Subject.MAP_RESOLVE, messages.encode(request))
        if not data:
            raise BusUnavailableError("map_writer does not know the whole mesh yet")
        reply = messages.decode(ResolveReply, data)
        if (len(reply.services), len(reply.addresses)) != (len(request.services), len(request.addresses)):
            raise ContractError("an answer to another question")
        return reply

    def _note_failure(self, error: str) -> None:
        self.failures += 1
        if not self._error:
            log.info("names_awaited", error=error)
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._tried.set()
        self._tried = anyio.Event()

    async def settle(self, services: set[int], ips: set[Ip], deadline_s: float) -> None:
        """Returns when all of them are answered, when nobody answers, or after `deadline_s`."""
        with anyio.move_on_after(deadline_s):
            while not self._are_answered(services, ips) and not self._error:
                await self._tried.wait()

    def _are_answered(self, services: set[int], ips: set[Ip]) -> bool:
        # Lists, so that all of them are asked for at once.
        ends = [self.service(s).fresh_until for s in services] + [self.workload(ip).fresh_until for ip in ips]
        return all(end > 0 for end in ends)

    def status(self) -> dict[str, Any]:
        return {
            "services": {"cached": len(self.services), "open": self.services.open_questions},
            "workloads": {"cached": len(self.workloads), "open": self.workloads.open_questions},
            "requests": self.requests,
            "failures": self.failures,
            "error": self._error,
        }
