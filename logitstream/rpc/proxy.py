"""The HTTP proxy between this machine and a server, by the variables that gRPC reads.

gRPC decides by the address that it is given. Names are looked up before that here, so it would never see the name in
`no_proxy`: whether a proxy is used is decided here, by the name and by the address.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from logitstream.rpc.addresses import is_loopback, split_address

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")


def proxy_of(address: str, server_name: str = "") -> str:
    """Return the proxy that a channel to this address goes through, its URL without a password, and its variable.

    As in gRPC the first variable that is set decides, an empty one against a proxy, and a URL that is not http:// is
    passed over. An exception is the end of a name or a network in CIDR notation, and may name a port; `*` excepts
    everything.
    """
    if is_loopback(address):
        return ""
    host, port = split_address(address)
    variable = next((name for name in PROXY_VARIABLES if name in os.environ), "")
    url = urlsplit(os.environ.get(variable, ""))
    exceptions = next((os.environ[name] for name in EXCEPTION_VARIABLES if name in os.environ), "")
    names = [name.lower().removesuffix(".") for name in (server_name, host) if name]
    entries = [entry for entry in re.split(r"[,\s]+", exceptions.lower()) if entry]
    if url.scheme != "http" or any(_excepts(entry, name, port) for entry in entries for name in names):
        return ""
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]} (${variable})"


def _excepts(entry: str, host: str, port: int) -> bool:
    name, _, its_port = entry.rpartition(":")
    if not its_port.isdigit() or (":" in name and not name.endswith("]")):
        name, its_port = entry, str(port)
    name = name.removeprefix("*").removeprefix("[").removesuffix("]")
    if its_port != str(port):
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return host.endswith(name)
