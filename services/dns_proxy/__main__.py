"""`python -m services.dns_proxy`"""

from __future__ import annotations

from pykmesh.contracts.settings import DnsProxySettings
from pykmesh.process import main
from services.dns_proxy.app import run

if __name__ == "__main__":
    main("dns_proxy", DnsProxySettings, run)
