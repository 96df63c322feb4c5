"""`pykmesh observe` on recordings: what it keeps, how it looks, and that losses are seen."""

from __future__ import annotations

import msgspec
import pytest
from click.testing import CliRunner, Result

from pykmesh.cli.observe import command
from pykmesh.contracts.flows import Flow, FlowService, Lost, LostLine, Peer


def no_instance(_: object) -> str:
    return "http://127.0.0.1:1"


def flow(
    *,
    pod: str = "shop/client",
    service: str | None = "shop/web",
    verdict: str = "closed",
    reason: str = "",
    protocol: str = "TCP",
    time: str = "2026-01-31T17:03:12.123456Z",
    destination: str = "shop/web-1",
) -> Flow:
    source_namespace, source = pod.split("/")
    to_namespace, to = destination.split("/")
    is_counted = protocol == "TCP"
    asked = service.split("/") if service else None
    return Flow(
        time=time,
        verdict=verdict,
        reason=reason,
        direction="outbound",
        protocol=protocol,
        source=Peer(address="10.244.0.5", port=41234, workload=source, namespace=source_namespace),
        service=FlowService(namespace=asked[0], name=asked[1], port=80) if asked else None,
        destination=Peer(address="10.244.0.9", port=8080, workload=to, namespace=to_namespace),
        sent_bytes=83 if is_counted else None,
        received_bytes=1175 if is_counted else None,
        duration_ms=12.34,
        srtt_us=296,
        retransmits=0,
    )


def observe(*words: str, lines: list[Flow | LostLine] | bytes) -> Result:
    given = (
        lines if isinstance(lines, bytes) else b"".join(msgspec.json.encode(line) + b"\n\n" for line in lines)
    )
    runner = CliRunner(env={"TZ": "UTC"})
    return runner.invoke(command(no_instance), ["--input-file", "-", *words], input=given)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def test_a_flow_is_one_line():
    found = observe(lines=[flow()])
    assert found.stdout == (
        "17:03:12.123  shop/client 10.244.0.5:41234 -> web.shop:80 -> shop/web-1 10.244.0.9:8080  "
        "TCP closed  sent 83 received 1175  12.3 ms\n"
    )
    assert found.stderr == "1 flows, 0 lost\n"


def test_a_refusal_names_the_service_and_the_reason_and_no_endpoint():
    found = observe(lines=[flow(verdict="refused", reason="no_endpoint")])
    assert (
        found.stdout == "17:03:12.123  shop/client 10.244.0.5:41234 -> web.shop:80  TCP refused no_endpoint\n"
    )


def test_a_datagram_flow_has_no_bytes():
    found = observe(lines=[flow(protocol="UDP", service=None)])
    assert found.stdout.endswith(
        "shop/client 10.244.0.5:41234 -> shop/web-1 10.244.0.9:8080  UDP closed  12.3 ms\n"
    )


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], [0, 1, 2, 3]),
        (["--verdict", "refused"], [1]),
        (["--verdict", "refused", "--verdict", "failed"], [1, 2]),
        (["--from-pod", "cli"], [0, 1, 3]),
        (["--from-pod", "other/client"], [3]),
        (["--to-service", "shop/web"], [0, 1, 3]),
        (["--protocol", "UDP"], [3]),
        (["--not", "--protocol", "udp"], [0, 1, 2]),
        (["--not", "--verdict=closed", "--from-pod", "shop/client"], [1]),
        (["--not", "--to-service", "web", "--verdict", "failed"], [2]),
        (["--last", "2"], [2, 3]),
        (["--last", "1", "--from-pod", "shop/client"], [1]),
        (["--since", "2026-01-31T17:30:00Z"], [3]),
    ],
)
def test_filters_keep_what_meets_all_of_them(words: list[str], kept: list[int]):
    flows = [
        flow(),
        flow(verdict="refused", reason="no_endpoint"),
        flow(verdict="failed", reason="ECONNREFUSED", pod="shop/cron", service="shop/db"),
        flow(protocol="UDP", pod="other/client", time="2026-01-31T18:00:00.000000Z"),
    ]
    found = observe("-o", "json", *words, lines=flows)
    assert found.exit_code == 0, found.output
    assert [msgspec.json.decode(line, type=Flow) for line in found.stdout.splitlines()] == [
        flows[i] for i in kept
    ]


@pytest.mark.parametrize(
    "words", [["--not"], ["--not", "--last", "3"], ["--not", "--not", "--verdict", "closed"]]
)
def test_not_stands_before_a_filter(words: list[str]):
    found = observe(*words, lines=[])
    assert found.exit_code == 2
    assert "--not stands before a filter" in found.stderr


def test_since_is_a_time_or_how_long_ago():
    assert observe("--since", "1h30m", lines=[flow()]).stdout == ""
    assert observe("--since", "yesterday", lines=[flow()]).exit_code == 2


def test_losses_are_told_when_they_happen_and_summed_at_the_end():
    lost = [
        LostLine(Lost(time=flow().time, where=where, flows=n)) for where, n in (("observer", 5), ("ring", 2))
    ]
    found = observe(lines=[flow(), *lost, flow()])
    assert found.stdout.count("\n") == 2
    assert found.stderr == (
        "17:03:12.123  5 flows lost: this observer was too slow\n"
        "17:03:12.123  2 flows lost: the ring was full\n"
        "2 flows, 7 lost\n"
    )
    assert [line for line in observe("-o", "json", lines=lost).stdout.splitlines() if '"lost"' in line]


def test_the_table_has_a_heading_and_a_line_for_each():
    found = observe("-o", "table", lines=[flow(service=None)])
    heading, row = found.stdout.splitlines()
    assert [heading.split()[n] for n in (0, 1, -1)] == ["TIME", "SOURCE", "DURATION"]
    assert "10.244.0.5:41234" in row


def test_a_line_that_is_no_flow_is_an_error_that_shows_it():
    found = observe(lines=b'{"hello": 1}\n')
    assert found.exit_code == 1
    assert "hello" in found.stderr


def test_telemetry_that_is_away_is_an_error_that_says_where():
    found = CliRunner().invoke(command(no_instance), [])
    assert found.exit_code == 1
    assert "http://127.0.0.1:1" in found.stderr
    assert "is telemetry up?" in found.stderr


@pytest.mark.parametrize("output", ["compact", "table", "json"])
def test_what_a_terminal_would_obey_is_escaped_but_in_json(output: str) -> None:
    given = flow(pod="shop/client\x1b[2J", service="sh\nop/web\x07")
    said = observe("-o", output, lines=[given]).stdout
    assert not set(said) & {"\x1b", "\x07"}
    assert len(said.splitlines()) == (2 if output == "table" else 1)
    if output == "json":
        assert msgspec.json.decode(said.encode(), type=Flow) == given
    else:
        assert r"client\x1b[2J" in said
        assert r"sh\nop" in said
