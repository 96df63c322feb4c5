"""Wires dns_proxy: pins -> pods and their sockets -> resolver; names come by the bus.

It listens in the pods' own network namespaces (bpf/dns.h sends the questions there). Without the bus, or
without map_writer, it sends questions on: its absence is never worse than not having it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import anyio
import structlog
from prometheus_client.core import Metric

from pykmesh import metrics
from pykmesh.contracts.settings import DnsProxySettings
from pykmesh.kernel.maps import PinError
from pykmesh.process import Runtime, raise_file_limit
from services.dns_proxy.answers import Answers
from services.dns_proxy.health import Health
from services.dns_proxy.pods import Pins, Pods
from services.dns_proxy.resolver import Resolver
from services.dns_proxy.upstream import Upstream

log = structlog.get_logger(__name__)


async def run(runtime: Runtime[DnsProxySettings]) -> None:
    """Waits for the pins, then serves until cancelled. Questions go past the proxy from then on."""
    for task in ("pins", "pods"):
        runtime.readiness.wait_for(task)
    settings = runtime.settings
    raise_file_limit()  # sixteen sockets a pod, and one for each question that is sent on
    health, answers = Health(), Answers(settings.network, settings.answer_deadline_s)
    resolver = Resolver(answers, Upstream(settings.upstream_timeout_s, health), health)
    opened = await runtime.open_pins(Pins, PinError)
    with contextlib.closing(opened):
        pods = Pods(opened, settings.enroll_socket, resolver, settings.slot_rest_s, runtime.note_error)
        runtime.details = lambda: {**pods.status(), **_status(answers, resolver, health)}
        metrics.add_page(runtime.admin, lambda: _health(health, pods, resolver))
        async with anyio.create_task_group() as tasks:
            await tasks.start(pods.run)
            runtime.readiness.done("pods")
            answers.bus = await runtime.connect_bus()
            await anyio.sleep_forever()


def _status(answers: Answers, resolver: Resolver, health: Health) -> dict[str, Any]:
    return {
        "requests": health.requests,
        "answered": health.answered,
        "unanswered_by_map_writer": answers.unanswered,
        "open": resolver.open,
        "kept": len(answers),
    }


def _health(health: Health, pods: Pods, resolver: Resolver) -> Iterator[Metric]:
    yield from health.collect()
    yield metrics.gauge("mesh_dns_pods", "Pods whose questions are taken.", pods.status()["pods"])
    yield metrics.gauge("mesh_dns_open_requests", "Questions that are open.", resolver.open)
    yield from pods.fill()
