"""Which clients' connections to a port that is no HTTP are closed before a byte is said. Pure.

Envoy's network RBAC filter is asked when the client's first byte comes: a server that speaks first would have
said its greeting to somebody who may not hear it. What policies say of who the client is can be known before,
for it stands in the address that Envoy is told, by which it chooses a chain of filters.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pykmesh.contracts.handoff import ALL_BITS, told_address
from pykmesh.kernel.records import ip_from_text
from services.waypoint_mgr.envoy import Json, Range, everybodys

_Network = ipaddress.IPv6Network


def turned_away(rules: Sequence[Json], vips: Sequence[str]) -> tuple[list[Range], list[Range]]:
    """Ranges of told addresses: where there may be somebody to let in, and where there is nobody.

    `rules`: of the port's RBAC filters. The longest range counts: each that a rule names stands for itself,
    and whoever is in none of them for all the others of his namespace, or of all.
    """
    named = {found for one in rules for found in _ranges_in(one)}
    unknown = (Range(told_address(ip_from_text(vip)), ALL_BITS) for vip in vips)
    let_in, out = list[Range](), list[Range]()
    for told in sorted({*everybodys(vips), *unknown, *named}):
        refused = any(_refuses(one, _Network(told)) for one in rules)
        (out if refused else let_in).append(told)
    return (let_in, out) if out else (everybodys(vips), [])


def _ranges_in(part: object) -> Iterator[Range]:
    """All that conditions within name."""
    if isinstance(part, list):
        for item in part:
            yield from _ranges_in(item)
    elif isinstance(part, dict):
        if (found := part.get("destinationIp")) is not None:
            yield Range(found["addressPrefix"], found["prefixLen"])
        for item in part.values():
            yield from _ranges_in(item)


def _refuses(rules: Json, client: _Network) -> bool:
    """Whatever else there is to ask."""
    found = [_matches(policy, client) for policy in rules["policies"].values()]
    return True in found if rules["action"] == "DENY" else all(one is False for one in found)


def _matches(policy: Json, client: _Network) -> bool | None:
    parts = (_either(_holds(part, client) for part in policy[key]) for key in ("permissions", "principals"))
    return _both(parts)


def _holds(condition: Mapping[str, Json], client: _Network) -> bool | None:
    """None where it is not known yet."""
    ((kind, said),) = condition.items()
    match kind:
        case "any":
            return True
        case "destinationIp":
            return client.subnet_of(_Network((said["addressPrefix"], said["prefixLen"])))
        case "notRule" | "notId":
            found = _holds(said, client)
            return None if found is None else not found
        case "andRules" | "andIds":
            return _both(_holds(part, client) for part in _parts(said))
        case "orRules" | "orIds":
            return _either(_holds(part, client) for part in _parts(said))
        case _:
            return None


def _parts(said: Json) -> Iterator[Json]:
    for parts in said.values():
        yield from parts


def _both(found: Iterable[bool | None]) -> bool | None:
    known = set(found)
    return False if False in known else None if None in known else True


def _either(found: Iterable[bool | None]) -> bool | None:
    known = set(found)
    return True if True in known else None if None in known else False
