"""What can be set about the embedded control plane."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import msgspec

from pykmesh.controlplane.dialect import Dialect


class MeshSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a translation needs to know that no object says."""

    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    network: str = ""
    domain: str = "cluster.local"
    dialect: Dialect = Dialect.V1_31


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


class ControlPlaneSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one control plane. `listen_port` 0 takes any free port."""

    config_dir: Path
    listen_host: str = "127.0.0.1"
    listen_port: int = 15010
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    network: str = ""
    domain: str = "cluster.local"
    service_cidr_v4: str = "10.96.0.0/16"
    service_cidr_v6: str = "fd96::/112"
    pod_cidr_v4: str = "10.244.0.0/16"
    pod_cidr_v6: str = "fd44::/112"
    poll_ms: int = 100
    """How often the folder is looked at."""
    debounce_ms: int = 20
    """How long the folder must have been quiet before a change is read."""
    dialect: str = "1.31"
    """The release of istiod to speak like: see `Dialect.named`."""

    @property
    def mesh(self) -> MeshSettings:
        return MeshSettings(
            cluster_id=self.cluster_id,
            trust_domain=self.trust_domain,
            network=self.network,
            domain=self.domain,
            dialect=Dialect.named(self.dialect),
        )

    @property
    def ranges(self) -> AddressRanges:
        return AddressRanges(
            service_v4=self.service_cidr_v4,
            service_v6=self.service_cidr_v6,
            pod_v4=self.pod_cidr_v4,
            pod_v6=self.pod_cidr_v6,
        )
