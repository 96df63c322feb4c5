"""The names of all workloads' accounts, and the ids that waypoints are told of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, NamedTuple

import anyio
import anyio.to_thread
import structlog

from pykmesh.contracts.address import TRUST_DOMAIN, workload_message
from pykmesh.contracts.waypoints import account_name
from services.map_writer.identities import Identities
from services.map_writer.mesh import Mesh, raw_of

log = structlog.get_logger(__name__)

ACCOUNTS_MAX: Final = 50_000
"""A message of the bus has room for about twice as many."""
_RESTS: Final = 9
"""So many times as long as it took to read them they are not read again."""


class Account(NamedTuple):
    namespace: str
    name: str
    """`contracts.waypoints.account_name`."""


class Principals:
    """By SPIFFE names without the scheme. What was said of a workload is read once."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._read: dict[bytes, tuple[Account, str]] = {}
        self._turn = anyio.Lock()
        self._last: dict[str, bytes] = {}
        self._good_until = 0.0

    async def of(self, mesh: Mesh) -> dict[str, bytes]:
        """Beside the loop: for 100,000 workloads it takes half a second, later a tenth. May be that old."""
        async with self._turn:
            if time.monotonic() >= self._good_until:
                began = time.monotonic()
                raws = [raw_of(workload) for workload in mesh.workloads.values()]
                self._last = await anyio.to_thread.run_sync(self._with_ids, raws)
                ended = time.monotonic()
                self._good_until = ended + _RESTS * (ended - began)
            return self._last

    def _with_ids(self, raws: list[bytes]) -> dict[str, bytes]:
        namespace_id, account_id = self._identities.namespace_id, self._identities.account_id
        found = self.accounts(raws)
        if len(found) > ACCOUNTS_MAX:
            log.warning("too_many_accounts", count=len(found), effect="waypoints forward no client's name")
            return {}
        return {name: namespace_id(each.namespace) + account_id(each.name) for name, each in found.items()}

    def accounts(self, raws: Iterable[bytes]) -> dict[str, Account]:
        """An account that is in several trust domains has no name: ids do not tell them apart."""
        self._read = {raw: self._read.get(raw) or _account(raw) for raw in raws}
        names = dict[Account, set[str]]()
        for account, name in set(self._read.values()):
            names.setdefault(account, set()).add(name)
        return {name: account for account, (name, *others) in names.items() if name and not others}


def _account(raw: bytes) -> tuple[Account, str]:
    """And its principal; "" of a workload that says no namespace."""
    said = workload_message(raw)
    account = Account(said.namespace, account_name(said.namespace, said.service_account))
    domain, service_account = said.trust_domain or TRUST_DOMAIN, said.service_account or "default"
    return account, f"{domain}/ns/{said.namespace}/sa/{service_account}" if said.namespace else ""
