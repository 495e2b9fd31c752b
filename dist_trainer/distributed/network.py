"""This host on its network: the interface that leads to another one, and whether an address is its own."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import MutableMapping

ELSEWHERE = "203.0.113.1"
"""An address of no host (RFC 5737): the route to it is the default one."""


def _resolve(host: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    return family, (str(address[0]), 9)


def own_address(host: str) -> str:
    """The address by which `host` reaches this host. Nothing is sent.

    Where `host` is this one and resolves to loopback, as Debian's /etc/hosts has it, that of the default route, if
    there is one. Raises OSError where `host` does not resolve (socket.gaierror), or no route leads there.
    """
    family, address = _resolve(host)
    if is_own(host):
        if ipaddress.ip_address(address[0]).is_loopback and host not in ("localhost", address[0]):
            with contextlib.suppress(OSError):
                return own_address(ELSEWHERE)
        return address[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def is_own(host: str) -> bool:
    """Whether `host` names this host: a socket can be bound to it."""
    try:
        family, address = _resolve(host)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address[0], 0))
            return True
    except OSError:
        return False


def use_interface(address: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo and NCCL use the interface with this address of this host, unless the variables are set."""
    if interface := interface_of(address):
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":  # NCCL needs none on one host
            environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def interface_of(address: str) -> str | None:
    """The name of the interface with this address of this host, such as eth0."""
    import psutil  # only to launch

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None
