"""Which clients' connections to a port that is no HTTP are closed before a byte is said. Pure.

Envoy's network RBAC filter is asked when the client's first byte comes: a server that speaks first would have
said its greeting to somebody who may not hear it. What policies say of who the client is can be known before,
for it stands in the address that Envoy is told, by which it chooses a chain of filters.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence

from pykmesh.contracts.handoff import ALL_BITS, told_address
from pykmesh.kernel.records import ip_from_text
from services.waypoint_mgr.envoy import Json, Range, everybodys

_Client = tuple[int, int]
"""A range of told addresses: the first, and how many bits they have in common."""
_Holds = Callable[[_Client], bool | None]
"""Whether a condition is met by a client; None where that is not known yet."""


def turned_away(rules: Sequence[Json], vips: Sequence[str], secret: bytes) -> tuple[list[Range], list[Range]]:
    """Ranges of told addresses: where there may be somebody to let in, and where there is nobody.

    `rules`: of the port's RBAC filters. The longest range counts: each that a rule names stands for itself,
    and whoever is in none of them for all the others of his namespace, or of all.
    """
    unknown = (Range(told_address(ip_from_text(vip), secret), ALL_BITS) for vip in vips)
    ranges = {*everybodys(vips, secret), *unknown}
    refusals = [_refusal(one, ranges) for one in rules]
    let_in, out = list[Range](), list[Range]()
    for told in sorted(ranges):
        client = int(ipaddress.IPv6Address(told.address)), told.bits
        (out if any(refuses(client) for refuses in refusals) else let_in).append(told)
    return (let_in, out) if out else (everybodys(vips, secret), [])


def _refusal(rules: Json, ranges: set[Range]) -> Callable[[_Client], bool]:
    """Whether a client is refused whatever else there is to ask. Adds the ranges that are named."""
    policies = [_policy(policy, ranges) for policy in rules["policies"].values()]
    if rules["action"] == "DENY":
        return lambda client: any(holds(client) is True for holds in policies)
    return lambda client: all(holds(client) is False for holds in policies)


def _policy(policy: Json, ranges: set[Range]) -> _Holds:
    parts = [
        _either([_condition(part, ranges) for part in policy[key]]) for key in ("permissions", "principals")
    ]
    return _both(parts)


def _condition(condition: Json, ranges: set[Range]) -> _Holds:
    ((kind, said),) = condition.items()
    match kind:
        case "any":
            return lambda _: True
        case "destinationIp":
            ranges.add(found := Range(said["addressPrefix"], said["prefixLen"]))
            return _within_any({found})
        case "notRule" | "notId":
            return _opposite(_condition(said, ranges))
        case "andRules" | "andIds":
            return _both(_conditions(said, ranges))
        case "orRules" | "orIds":
            return _either(_alternatives(said, ranges))
        case _:
            return lambda _: None


def _conditions(said: Json, ranges: set[Range]) -> list[_Holds]:
    return [_condition(part, ranges) for parts in said.values() for part in parts]


def _alternatives(said: Json, ranges: set[Range]) -> list[_Holds]:
    """Those that ask for an address, of which there may be thousands, as one."""
    parts = [*_flat(said)]
    asked = [each["destinationIp"] for each in parts if "destinationIp" in each]
    wanted = {Range(each["addressPrefix"], each["prefixLen"]) for each in asked}
    ranges |= wanted
    others = [_condition(each, ranges) for each in parts if "destinationIp" not in each]
    return [_within_any(wanted), *others] if wanted else others


def _flat(said: Json) -> Iterator[Json]:
    """What stands in alternatives of alternatives."""
    for part in (part for some in said.values() for part in some):
        nested = part.get("orRules") or part.get("orIds")
        if nested:
            yield from _flat(nested)
        else:
            yield part


def _within_any(wanted: set[Range]) -> _Holds:
    beginnings: dict[int, set[int]] = {}
    for one in wanted:
        rest = ALL_BITS - one.bits
        beginnings.setdefault(rest, set()).add(int(ipaddress.IPv6Address(one.address)) >> rest)

    def holds(client: _Client) -> bool:
        return any(
            client[1] >= ALL_BITS - rest and client[0] >> rest in some for rest, some in beginnings.items()
        )

    return holds


def _opposite(part: _Holds) -> _Holds:
    def holds(client: _Client) -> bool | None:
        found = part(client)
        return None if found is None else not found

    return holds


def _both(parts: Sequence[_Holds]) -> _Holds:
    def holds(client: _Client) -> bool | None:
        known: bool | None = True
        for part in parts:
            found = part(client)
            if found is False:
                return False
            known = known and found
        return known

    return holds


def _either(parts: Sequence[_Holds]) -> _Holds:
    def holds(client: _Client) -> bool | None:
        known: bool | None = False
        for part in parts:
            found = part(client)
            if found:
                return True
            known = None if found is None else known
        return known

    return holds
