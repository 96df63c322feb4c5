"""The spec of Istio's AuthorizationPolicy (security.istio.io/v1), with the rules that Istio checks.

A field that is not known is refused: what is passed over of a condition lets more in than its author wanted.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any, Final

import msgspec

from pykmesh.manifests.addresses import IPRange
from pykmesh.manifests.http_route import CORE_GROUPS, GATEWAY_GROUP, ISTIO_GROUP
from pykmesh.manifests.names import Name

_KEYS: Final = re.compile(
    r"request\.headers\[:?[-A-Za-z0-9!#$%&'*+.^_`|~]+\]|source\.(ip|namespace|principal|serviceAccount)|remote\.ip"
    r"|destination\.(ip|port)|connection\.sni|request\.auth\.(principal|audiences|presenter)"
    r"|request\.auth\.claims(\[[^\[\]]+\])+|experimental\.envoy\.filters\..+"
)

Value = Annotated[str, msgspec.Meta(min_length=1)]
Values = tuple[Value, ...]
Port = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,5}\Z")]
ServiceAccount = Annotated[str, msgspec.Meta(pattern=r"^[^/]+(/[^/]+)?\Z")]
"""`account` of the policy's own namespace, or `namespace/account`."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False, forbid_unknown_fields=True):
    """How all parts are read."""

    def _says_something(self) -> bool:
        return any(getattr(self, field) for field in self.__struct_fields__)


class Action(Enum):
    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"


class Source(_Part, frozen=True, kw_only=True):
    principals: Values = ()
    not_principals: Values = ()
    request_principals: Values = ()
    not_request_principals: Values = ()
    namespaces: Values = ()
    not_namespaces: Values = ()
    service_accounts: tuple[ServiceAccount, ...] = ()
    not_service_accounts: tuple[ServiceAccount, ...] = ()
    trust_domains: Values = ()
    not_trust_domains: Values = ()
    ip_blocks: tuple[IPRange, ...] = ()
    not_ip_blocks: tuple[IPRange, ...] = ()
    remote_ip_blocks: tuple[IPRange, ...] = ()
    not_remote_ip_blocks: tuple[IPRange, ...] = ()

    def __post_init__(self) -> None:
        if not self._says_something():
            raise ValueError("a source must say something")


class From(_Part, frozen=True, kw_only=True):
    source: Source


class Operation(_Part, frozen=True, kw_only=True):
    hosts: Values = ()
    not_hosts: Values = ()
    ports: tuple[Port, ...] = ()
    not_ports: tuple[Port, ...] = ()
    methods: Values = ()
    not_methods: Values = ()
    paths: Values = ()
    not_paths: Values = ()

    def __post_init__(self) -> None:
        if not self._says_something():
            raise ValueError("an operation must say something")


class To(_Part, frozen=True, kw_only=True):
    operation: Operation


class When(_Part, frozen=True, kw_only=True):
    key: str
    values: Values = ()
    not_values: Values = ()

    def __post_init__(self) -> None:
        if not _KEYS.fullmatch(self.key):
            raise ValueError(f"key is not known: {self.key!r}")
        if not self.values and not self.not_values:
            raise ValueError("one or both of values and notValues must be given")


class Rule(_Part, frozen=True, kw_only=True):
    """One that says nothing matches everything."""

    from_: tuple[From, ...] = msgspec.field(name="from", default=())
    to: tuple[To, ...] = ()
    when: tuple[When, ...] = ()


class Selector(_Part, frozen=True, kw_only=True):
    match_labels: dict[str, str] = {}


class PolicyTargetRef(_Part, frozen=True, kw_only=True):
    """In the policy's own namespace, but for a GatewayClass, which has none."""

    group: str = ""
    kind: str
    name: Name
    namespace: str = ""

    def __post_init__(self) -> None:
        groups = _GROUPS.get(self.kind)
        if groups is None or self.group not in groups:
            known = ", ".join(_GROUPS)
            raise ValueError(f"{self.group}/{self.kind} is no target of policies: {known} are")


_GROUPS: Final = {
    "Gateway": (GATEWAY_GROUP,),
    "GatewayClass": (GATEWAY_GROUP,),
    "Service": CORE_GROUPS,
    "ServiceEntry": (ISTIO_GROUP,),
}


class TargetedSpec(_Part, frozen=True, kw_only=True):
    """Of a policy that is for workloads, or for targets."""

    selector: Selector | None = None
    target_ref: PolicyTargetRef | None = None
    target_refs: tuple[PolicyTargetRef, ...] = ()

    def __post_init__(self) -> None:
        if sum(bool(part) for part in (self.selector, self.target_ref, self.target_refs)) > 1:
            raise ValueError("at most one of selector, targetRef and targetRefs may be given")

    @property
    def targets(self) -> tuple[PolicyTargetRef, ...]:
        return (self.target_ref,) if self.target_ref else self.target_refs


class AuthorizationPolicySpec(TargetedSpec, frozen=True, kw_only=True):
    """`rules`: none of them, and it matches nothing, so that one that allows denies all."""

    action: Action = Action.ALLOW
    provider: dict[str, Any] | None = None
    rules: Annotated[tuple[Rule, ...], msgspec.Meta(max_length=512)] = ()
