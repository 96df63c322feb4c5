"""`pykmesh observe`: flows as they end, one a line, with hubble's flag names.

What is missing is never silent: losses are told when they happen and summed at the end, on standard
error (with `-o json` they are lines of the stream). Reads telemetry's `/flows`, or a recording of it.
"""

from __future__ import annotations

import contextlib
import http.client
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import click

from pykmesh.cli.output import escaped
from pykmesh.contracts.flows import Flow, FlowLineError, Lost, Peer, parse

DEFAULT_LAST: Final = 20
SILENCE_S: Final = 5.0
_UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_FILTERS: Final = ("verdict", "from-pod", "to-service", "protocol")
_COLUMNS: Final = "{:<12}  {:<32}  {:<24}  {:<32}  {:<5}  {:<8}  {:<20}  {:>10}  {:>10}  {:>10}"
_HEADINGS: Final = (
    "TIME", "SOURCE", "SERVICE", "DESTINATION", "PROTO", "VERDICT", "REASON", "SENT", "RECEIVED", "DURATION",
)  # fmt: skip


class ObserveError(Exception):
    """The flows cannot be read; the text says from where, why, and what to do."""


class Filters(NamedTuple):
    """Each field: any of its values, none: everything. `unwanted` takes away what it would find."""

    verdict: tuple[str, ...] = ()
    from_pod: tuple[str, ...] = ()
    to_service: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()
    unwanted: Filters | None = None
    since: datetime | None = None

    def keep(self, flow: Flow) -> bool:
        if self.since is not None and _time(flow.time) < self.since:
            return False
        if self.unwanted is not None and any(self.unwanted.found(flow)):
            return False
        return all(self.found(flow))

    def found(self, flow: Flow) -> Iterator[bool]:
        """For each filter that is set, whether the flow meets it."""
        service = (flow.service.namespace, flow.service.name) if flow.service else ("", "")
        if self.verdict:
            yield flow.verdict in self.verdict
        if self.from_pod:
            source = flow.source.namespace, flow.source.workload
            yield any(_is_named(wanted, *source) for wanted in self.from_pod)
        if self.to_service:
            yield any(_is_named(wanted, *service) for wanted in self.to_service)
        if self.protocol:
            yield flow.protocol.lower() in self.protocol

    def query(self) -> dict[str, str]:
        """What telemetry can filter itself, so that a flood of others does not push these out."""
        asked = {"verdict": ",".join(self.verdict), "protocol": ",".join(self.protocol)}
        return {name: value for name, value in asked.items() if value}


def _is_named(wanted: str, namespace: str, name: str) -> bool:
    """`[namespace/]prefix`, as hubble has it; without a namespace: in any."""
    in_namespace, slash, prefix = wanted.rpartition("/")
    return bool(name) and name.startswith(prefix) and (not slash or namespace == in_namespace)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


class _Command(click.Command):
    """`--not` before a filter makes it the filter of its opposite, as in hubble."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_negated(args)))


def _negated(args: list[str]) -> Iterator[str]:
    opposite = False
    for arg in args:
        name = arg.split("=", 1)[0].removeprefix("--")
        if opposite and (not arg.startswith("--") or name not in _FILTERS):
            break
        if arg == "--not":
            opposite = True
            continue
        yield f"--not-{arg[2:]}" if opposite else arg
        opposite = False
    if opposite:
        raise click.UsageError(f"--not stands before a filter: {', '.join(f'--{name}' for name in _FILTERS)}")


def _since(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    """A time, or how long ago: 30s, 5m, 1h30m."""
    if value is None:
        return None
    if re.fullmatch(r"(\d+(ms|s|m|h|d))+", value):
        parts = re.findall(r"(\d+)(ms|s|m|h|d)", value)
        ago = sum(int(number) * _UNITS[unit] for number, unit in parts)
        return datetime.now(UTC) - timedelta(seconds=ago)
    try:
        found = datetime.fromisoformat(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: a time such as 5m or 2026-01-31T12:00:00Z") from error
    return found if found.tzinfo else found.astimezone()


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    verdicts, protocols = click.Choice(["closed", "failed", "refused"]), click.Choice(["tcp", "udp"], False)
    outputs = click.Choice(["compact", "json", "table"])
    for option in reversed(
        [
            click.option("-f", "--follow", is_flag=True, help="Go on with flows as they end."),
            click.option("--last", type=click.IntRange(min=0), help=f"The last N flows ({DEFAULT_LAST})."),
            click.option("--since", callback=_since, help="Flows since a time, or so long ago: 5m, 1h30m."),
            click.option("--verdict", type=verdicts, multiple=True, help="How it ended."),
            click.option("--from-pod", multiple=True, metavar="[NS/]PREFIX", help="The source's name."),
            click.option("--to-service", multiple=True, metavar="[NS/]PREFIX", help="The service's name."),
            click.option("--protocol", type=protocols, multiple=True, help="tcp or udp."),
            click.option("--not", "negation", is_flag=True, help="Turns the next filter round."),
            *(click.option(f"--not-{name}", multiple=True, hidden=True) for name in _FILTERS),
            click.option("-o", "--output", type=outputs, default="compact", help="How it is shown."),
            click.option("--input-file", type=click.File("rb"), help="A recording (-o json), - for stdin."),
        ]
    ):
        function = option(function)
    return function


def command(address: Callable[[click.Context], str]) -> click.Command:
    """The command; `address` finds telemetry's administrative URL when the command runs."""

    @click.command("observe", cls=_Command)
    @_options
    @click.pass_context
    def observe(context: click.Context, /, **values: Any) -> None:
        """Flows as they end: who talked to whom by which service, and how it went."""
        filters = _filters(values)
        last = _last(values)
        try:
            if values["input_file"] is not None:
                show(values["input_file"], values["output"], filters, values["last"])
            else:
                url = address(context)
                observe_flows(
                    url, follow=values["follow"], last=last, output=values["output"], filters=filters
                )
        except ObserveError as error:
            raise click.ClickException(str(error)) from error

    return observe


def _filters(values: dict[str, Any]) -> Filters:
    names = [name.replace("-", "_") for name in _FILTERS]
    unwanted = Filters(**{name: values[f"not_{name}"] for name in names})
    return Filters(
        **{name: values[name] for name in names},
        unwanted=unwanted if any(unwanted) else None,
        since=values["since"],
    )


def _last(values: dict[str, Any]) -> int | None:
    """None: all that telemetry still has."""
    if values["last"] is not None:
        return int(values["last"])
    if values["since"] is not None:
        return None
    return 0 if values["follow"] else DEFAULT_LAST


def observe_flows(url: str, *, follow: bool, last: int | None, output: str, filters: Filters) -> None:
    """Shows telemetry's flows until its answer ends or the user has enough. ObserveError when it is away.

    `url` is its administrative address, such as http://127.0.0.1:15213. `last`: of those that the
    filters keep; when following, of those that telemetry itself can filter.
    """
    query = filters.query()
    if follow:
        query["follow"] = "1"
        query |= {} if last is None else {"last": str(last)}
    with contextlib.closing(_lines(url, query, follow=follow)) as lines:
        show(lines, output, filters, None if follow else last)


def _lines(url: str, query: dict[str, str], *, follow: bool) -> Generator[bytes]:
    """A stream without flows still has a blank line every few seconds: silence means that it is dead."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SILENCE_S)
    try:
        connection.request("GET", f"/flows?{urlencode(query)}")
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            text = answer.read(300).decode(errors="replace").strip()
            raise ObserveError(f"{url}/flows: {answer.status} {text}")
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise ObserveError(
            f"{url}: {error or type(error).__name__}; is telemetry up? (pykmesh status)"
        ) from error
    finally:
        connection.close()
    if follow:
        raise ObserveError(f"{url}: telemetry ended the stream; is it being restarted?")


def show(lines: Iterable[bytes], output: str, filters: Filters, last: int | None = None) -> None:
    """Prints each flow as it comes, or the last ones, then how many there were and how many are missing."""
    screen = _Screen(output)
    kept: deque[tuple[Flow, bytes]] = deque(maxlen=last)
    try:
        for line in lines:
            found = _parsed(line)
            if isinstance(found, Lost):
                screen.lose(found, line)
            elif found is not None and filters.keep(found):
                kept.append((found, line))
            if last is None:
                screen.show(kept)
        screen.show(kept)
    except KeyboardInterrupt:
        pass
    finally:
        click.echo(f"{screen.shown} flows, {screen.lost} lost", err=True)


def _parsed(line: bytes) -> Flow | Lost | None:
    try:
        return parse(line)
    except FlowLineError as error:
        raise ObserveError(str(error)) from error


class _Screen:
    """Counts what it prints."""

    def __init__(self, output: str) -> None:
        self._output = output
        self.shown = 0
        self.lost = 0
        if output == "table":
            click.echo(_COLUMNS.format(*_HEADINGS))

    def show(self, kept: deque[tuple[Flow, bytes]]) -> None:
        while kept:
            flow, line = kept.popleft()
            self.shown += 1
            if self._output == "json":
                click.echo(line.rstrip())
            elif self._output == "table":
                click.echo(escaped(_COLUMNS.format(*_cells(flow))))
            else:
                click.echo(escaped(compact(flow)))

    def lose(self, lost: Lost, line: bytes) -> None:
        self.lost += lost.flows
        if self._output == "json":
            click.echo(line.rstrip())
            return
        why = "the ring was full" if lost.where == "ring" else "this observer was too slow"
        click.echo(f"{_clock(lost.time)}  {lost.flows} flows lost: {why}", err=True)


def compact(flow: Flow) -> str:
    """`17:03:12.123  shop/client 10.0.0.5:41234 -> web.shop:80 -> shop/web-1 10.0.0.9:8080  TCP closed  …`"""
    way = [_end(flow.source), *([_service(flow)] if flow.service else [])]
    if flow.verdict != "refused" or not flow.service:
        way.append(_end(flow.destination))
    verdict = f"{flow.protocol} {flow.verdict}" + (f" {flow.reason}" if flow.reason else "")
    parts = [_clock(flow.time), " -> ".join(way), verdict]
    if flow.sent_bytes is not None and flow.verdict == "closed":
        parts.append(f"sent {flow.sent_bytes} received {flow.received_bytes}")
    if flow.verdict != "refused":
        parts.append(f"{flow.duration_ms:.1f} ms")
    return "  ".join(parts)


def _cells(flow: Flow) -> tuple[str, ...]:
    sent, received = ("-" if n is None else str(n) for n in (flow.sent_bytes, flow.received_bytes))
    return (
        _clock(flow.time),
        _end(flow.source),
        _service(flow) if flow.service else "-",
        _end(flow.destination),
        flow.protocol,
        flow.verdict,
        flow.reason or "-",
        sent,
        received,
        f"{flow.duration_ms:.1f} ms",
    )


def _end(peer: Peer) -> str:
    host = f"[{peer.address}]" if ":" in peer.address else peer.address
    address = f"{host}:{peer.port}" if peer.port else host
    name = f"{peer.namespace}/{peer.workload}" if peer.workload else ""
    return " ".join(part for part in (name, address) if part) or "unknown"


def _service(flow: Flow) -> str:
    service = flow.service
    if service is None:
        return ""
    return (
        f"{service.name}.{service.namespace}:{service.port}"
        if service.namespace
        else f"{service.name}:{service.port}"
    )


def _clock(text: str) -> str:
    """The viewer's time of day, to the millisecond."""
    return _time(text).astimezone().strftime("%H:%M:%S.%f")[:-3]
