"""How many instances a waypoint shall have, and why: a pure function of its load and what was found before.

As Kubernetes' HorizontalPodAutoscaler: for each target the size that would meet it, the largest of these, out
at once and in by the largest of a while. A Gateway's annotations say the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from pykmesh.contracts.enrollment import INSTANCES_MAX

LEAST: Final = "pykmesh.io/min-instances"
MOST: Final = "pykmesh.io/max-instances"
CPU: Final = "pykmesh.io/target-cpu-percent"
CONNECTIONS: Final = "pykmesh.io/target-connections"
SCALE_IN_AFTER: Final = "pykmesh.io/scale-in-after"
MEMORY: Final = "pykmesh.io/max-memory-mib"
SCALING: Final = (LEAST, MOST, CPU, CONNECTIONS, SCALE_IN_AFTER, MEMORY)

CPU_PERCENT_MAX: Final = 90
"""More could not be exceeded by more than the tolerance."""
TOLERANCE: Final = 0.1
"""A load this near to its target changes nothing."""
IDLE_S: Final = 10.0
"""The last instance is kept for so long at least: a client tries again after one second, three, seven."""
GROWTH_MAX: Final = 2
"""Times as many instances, at most, in one step."""


class Policy(msgspec.Struct, frozen=True):
    """`cpu_percent`: of one processor, which an instance's one worker thread can use."""

    least: int = 1
    most: int = 4
    cpu_percent: float = 70.0
    connections: int | None = None
    """Open connections an instance."""
    scale_in_after_s: float = 60.0
    memory_mib: int = 1024
    """Of an instance, which turns requests away before it has more."""

    @property
    def window_s(self) -> float:
        """How long what a load asked for counts: whom an instance was begun for comes back within seconds."""
        return self.scale_in_after_s if self.least else max(self.scale_in_after_s, IDLE_S)


class Load(NamedTuple):
    """Of all instances that are ready, together: processors in use, open connections."""

    instances: int
    processors: float
    connections: int


class Found(NamedTuple):
    """The size that a load asked for, at a time."""

    at_s: float
    size: int


class Decision(NamedTuple):
    """`asked` is what the load alone asks for now: to be remembered for the decisions to come."""

    size: int
    why: str
    asked: int


def policy_of(annotations: Mapping[str, str]) -> tuple[Policy, list[str]]:
    """What is wrong counts as not said, and is among the texts."""
    errors: list[str] = []

    def number(name: str, default: float, least: float, most: float) -> float:
        text = annotations.get(name)
        if text is None:
            return default
        try:
            value = float(text.removesuffix("s") if name == SCALE_IN_AFTER else text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (name not in (CPU, SCALE_IN_AFTER) and value % 1):
            errors.append(f"annotation {name}: {text!r}: expected a number from {least:g} to {most:g}")
            return default
        return value

    plain = Policy()
    least = int(number(LEAST, plain.least, 0, INSTANCES_MAX))
    most = int(number(MOST, max(plain.most, least), 1, INSTANCES_MAX))
    if most < least:
        errors.append(f"annotation {MOST}: {most} is less than {LEAST}, {least}")
        most = least
    connections = number(CONNECTIONS, 0, 1, 1_000_000)
    policy = Policy(
        least=least,
        most=most,
        cpu_percent=number(CPU, plain.cpu_percent, 1, CPU_PERCENT_MAX),
        connections=int(connections) or None,
        scale_in_after_s=number(SCALE_IN_AFTER, plain.scale_in_after_s, 0, 3600),
        memory_mib=int(number(MEMORY, plain.memory_mib, 64, 1 << 20)),
    )
    return policy, errors


def decide(policy: Policy, size: int, load: Load, before: Sequence[Found], now_s: float) -> Decision:
    """`size`: the instances that there shall be by now; `before`: what earlier loads asked for."""
    asked, why = _asked(policy, size, load)
    window = [found for found in before if found.at_s > now_s - policy.window_s]
    kept = max([asked, *(found.size for found in window)])
    if asked < size and kept > asked:
        wanted = min(size, kept)
        why += f"; {wanted} were needed within the last {policy.window_s:g} s"
    else:
        wanted = asked
    limited = min(max(wanted, policy.least), policy.most)
    if limited != wanted:
        why += f"; at {'least' if limited > wanted else 'most'} {limited}"
    return Decision(limited, why, asked)


def _asked(policy: Policy, size: int, load: Load) -> tuple[int, str]:
    """What the load asks for. Of what is not measured yet no opinion: the size stays."""
    if not load.instances:
        return max(size, policy.least), "no instance is ready" if size else "no connection asks for it"
    percent = 100 * load.processors / load.instances
    each = load.connections / load.instances
    busy = f"{percent:.0f} % of a processor each, target {policy.cpu_percent:g} %"
    parts = [(percent / policy.cpu_percent, busy)]
    if policy.connections:
        parts.append((each / policy.connections, f"{each:.0f} connections each, target {policy.connections}"))
    ratio, why = max(parts)
    if not load.connections and percent < policy.cpu_percent * TOLERANCE:
        return 0 if policy.least == 0 else 1, "idle"
    if abs(ratio - 1) <= TOLERANCE:
        return size, why
    asked = max(math.ceil(load.instances * ratio), 1)
    return min(asked, max(size, load.instances) * GROWTH_MAX), why
