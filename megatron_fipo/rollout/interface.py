"""Which of this machine's network addresses an engine listens on."""

from __future__ import annotations

import ipaddress
import socket

import psutil

LOOPBACK = "127.0.0.1"


def listening_address(interface: str | None) -> str:
    """The IPv4 address of an interface ("eth0", or its address itself); None: loopback.

    Raises ValueError when this machine has no such interface, and for the wildcard address: an engine listens on one.
    """
    if interface is None:
        return LOOPBACK
    addresses = _addresses()
    for name, address in addresses:
        if interface in (name, address):
            return address
    found = ", ".join(f"{name} ({address})" for name, address in addresses)
    raise ValueError(f"--rollout-interface is {interface!r}, but must be one of this machine's: {found}")


def interface_name(address: str) -> str:
    """The interface that has this address, as NCCL and gloo want it named."""
    if ipaddress.ip_address(address).is_loopback:
        address = LOOPBACK
    return next(name for name, its_address in _addresses() if its_address == address)


def address_towards(host: str) -> str:
    """The address of this machine that `host` sees: the one that packets to it leave from. Sends none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket only looks up the route
        return str(probe.getsockname()[0])


def _addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address) of this machine."""
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
