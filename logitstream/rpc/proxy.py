"""Which HTTP proxy stands between this machine and a server, by the variables that gRPC reads.

gRPC decides by the address that it is given. Names are looked up before that here, so it would never see the name that
`no_proxy` holds: who goes through the proxy is decided here, by the name and by the address.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")


def proxy_for(*hosts: str, port: int) -> str:
    """The proxy for a server known by these names and addresses, as URL without its password and variable; or nothing.

    As in gRPC the first variable that is set decides, an empty one against a proxy, and a URL that is not http:// is
    passed over. An exception is the end of a name or a network in CIDR notation, and may name a port; `*` excepts
    everything.
    """
    variable = next((name for name in PROXY_VARIABLES if name in os.environ), "")
    url = urlsplit(os.environ.get(variable, ""))
    exceptions = next((os.environ[name] for name in EXCEPTION_VARIABLES if name in os.environ), "")
    if url.scheme != "http" or any(_is_excepted(host, port, exceptions) for host in hosts if host):
        return ""
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]} (${variable})"


def _is_excepted(host: str, port: int, exceptions: str) -> bool:
    host = host.lower().removesuffix(".")
    for entry in re.split(r"[,\s]+", exceptions.lower()):
        name, its_port = _split_port(entry)
        if entry and its_port in ("", str(port)) and (host.endswith(name) or _is_in_network(host, name)):
            return True
    return False


def _split_port(entry: str) -> tuple[str, str]:
    """A name, address or network without a star before it or brackets around it, and a port where one is named."""
    name, _, port = entry.rpartition(":")
    if not port.isdigit() or (":" in name and not name.endswith("]")):
        name, port = entry, ""
    return name.removeprefix("*").removeprefix("[").removesuffix("]"), port


def _is_in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
