"""What the control plane's settings mean to the parts that need some of them."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Self

import msgspec

from pykmesh.contracts.settings import ControlPlaneSettings
from pykmesh.controlplane.dialect import Dialect


class MeshSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a translation needs to know that no object says."""

    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    network: str = ""
    domain: str = "cluster.local"
    dialect: Dialect = Dialect.V1_31

    @classmethod
    def of(cls, settings: ControlPlaneSettings) -> Self:
        """Raises `ValueError` for an unknown dialect."""
        return cls(
            cluster_id=settings.cluster_id,
            trust_domain=settings.trust_domain,
            network=settings.network,
            domain=settings.domain,
            dialect=Dialect.named(settings.dialect),
        )


class AddressRanges(msgspec.Struct, frozen=True, kw_only=True):
    """CIDR ranges of the addresses that are handed out; "" hands out none of that family.

    Raises `ValueError` for a range that is none.
    """

    service_v4: str = "10.96.0.0/16"
    service_v6: str = "fd96::/112"
    pod_v4: str = "10.244.0.0/16"
    pod_v6: str = "fd44::/112"
    entry_v4: str = "240.240.0.0/16"
    entry_v6: str = "2001:2::/48"

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            text = getattr(self, name)
            if text and ip_network(text).version != int(name[-1]):
                raise ValueError(f"{name}: {text} is not of that family")

    @classmethod
    def of(cls, settings: ControlPlaneSettings) -> Self:
        return cls(
            service_v4=settings.service_cidr_v4,
            service_v6=settings.service_cidr_v6,
            pod_v4=settings.pod_cidr_v4,
            pod_v6=settings.pod_cidr_v6,
        )
