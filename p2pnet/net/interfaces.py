"""From the addresses that we listen on to those where others may reach us."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import psutil

from p2pnet.net.multiaddr import of_socket

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def reachable_addrs(bound: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Multiaddrs of bound (host, port) pairs.

    A wildcard (0.0.0.0 or ::) becomes the machine's own addresses: those of
    loopback only where there is no other, link-local ones never, since they
    mean nothing without their interface.
    """
    addrs: dict[str, None] = {}  # in order, each once
    for host, port in bound:
        ip = ipaddress.ip_address(host)
        for each in _machine_ips(ip.version) if ip.is_unspecified else [host]:
            addrs[of_socket(each, port)] = None
    return tuple(addrs)


def _machine_ips(version: int) -> list[str]:
    ips = [
        ipaddress.ip_address(entry.address.partition("%")[0])
        for _, entries in sorted(psutil.net_if_addrs().items())
        for entry in entries
        if entry.family == _FAMILIES[version]
    ]
    ips = [ip for ip in ips if not ip.is_link_local]
    return [str(ip) for ip in ips if not ip.is_loopback] or [str(ip) for ip in ips]
