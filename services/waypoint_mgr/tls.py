"""TLS to endpoints, as a DestinationRule (mode SIMPLE) or a BackendTLSPolicy wants it. Pure.

Who answers is checked, but where `insecureSkipVerify` says not to: by the roots that are named, else the
system's, and by the names in `subjectAltNames`, else `sni`, else the host that a request is for. (Where `sni`
alone is said Istio takes any certificate of such a root.) What cannot be done so is not done without: the
endpoints get nothing.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from pykmesh.manifests.destination_rule import (
    ClientTLS,
    DestinationRuleSpec,
    PortPolicy,
    TLSMode,
    TrafficPolicy,
)
from services.waypoint_mgr.envoy import Json, named, typed
from services.waypoint_mgr.protocols import AppProtocol

SYSTEM_ROOTS: Final = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
_TYPES: Final = "transport_sockets.tls.v3.UpstreamTlsContext"


class Roots(msgspec.Struct, frozen=True):
    """Of files that rules name, with certificates of authorities: what is in them (PEM), or why it is not."""

    found: Mapping[str, str] = {}
    errors: Mapping[str, str] = {}


NO_ROOTS: Final = Roots()


def wanted(policy: PortPolicy | TrafficPolicy) -> ClientTLS | None:
    """ISTIO_MUTUAL is the mesh's own, of which there is none: ambient's is on the way, not at endpoints."""
    tls = policy.tls
    return tls if tls is not None and tls.mode in (TLSMode.SIMPLE, TLSMode.MUTUAL) else None


def obstacle(tls: ClientTLS, roots: Roots) -> str:
    """Why a waypoint cannot speak it; "" where it can."""
    if tls.mode is TLSMode.MUTUAL:
        return "there are no certificates of clients here"
    for name, said in (("credentialName", tls.credential_name), ("caCrl", tls.ca_crl)):
        if said:
            return f"{name} is not read"
    path = _root_file(tls)
    if path not in roots.found and not tls.insecure_skip_verify:
        return roots.errors.get(path, f"{path} is not read yet")
    return ""


def obstacle_for(tls: ClientTLS, protocol: AppProtocol) -> str:
    """Why it cannot be spoken by this protocol: nobody says whose certificate it should be."""
    has_name = tls.sni or tls.subject_alt_names or tls.insecure_skip_verify
    return "" if has_name or protocol is not AppProtocol.TCP else "without sni or subjectAltNames"


def files(spec: DestinationRuleSpec) -> Iterator[str]:
    """Those of roots that a rule is in need of."""
    policies = [spec.traffic_policy, *(each.traffic_policy for each in spec.subsets if each.traffic_policy)]
    for policy in policies:
        for tls in (wanted(policy), *map(wanted, policy.port_level_settings)):
            if tls is not None:
                yield _root_file(tls)


def socket(tls: ClientTLS, protocol: AppProtocol, roots: Roots) -> Json:
    """A cluster's transport socket."""
    common: Json = {}
    if protocol is AppProtocol.HTTP2:
        common["alpnProtocols"] = ["h2"]
    if not tls.insecure_skip_verify:
        common["validationContext"] = _validation(tls, roots)
    context = typed(_TYPES) | {"commonTlsContext": common} | ({"sni": tls.sni} if tls.sni else {})
    return named("envoy.transport_sockets.tls", context)


def http_options(tls: ClientTLS) -> Json:
    """What a cluster's HTTP connections take from the host of a request."""
    if tls.sni:
        return {}
    checks = not (tls.subject_alt_names or tls.insecure_skip_verify)
    return {"upstreamHttpProtocolOptions": {"autoSni": True, "autoSanValidation": checks}}


def _root_file(tls: ClientTLS) -> str:
    return tls.ca_certificates or SYSTEM_ROOTS


def _validation(tls: ClientTLS, roots: Roots) -> Json:
    found: Json = {"trustedCa": {"inlineString": roots.found[_root_file(tls)]}}
    names = tls.subject_alt_names or ((tls.sni,) if tls.sni else ())
    if names:
        found["matchTypedSubjectAltNames"] = [
            {"sanType": _kind(name), "matcher": {"exact": name}} for name in names
        ]
    return found


def _kind(name: str) -> str:
    if "://" in name:
        return "URI"
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "DNS"
    return "IP_ADDRESS"
