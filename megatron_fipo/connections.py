"""What the ranks' connections to each other do when a machine or a network goes away without a word.

A rank that ends closes its connections, and the others notice at once. A machine that loses its power or its network
closes nothing: a rank that waits for it would wait for as long as its collective may take, which for rank 0's rollouts
is days. gloo leaves TCP's own remedies off.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from pathlib import Path

NUM_PROBES = 4


def notice_lost_machines(timeout_s: int) -> int:
    """From now on a connection of this process to another machine breaks when that has not answered for `timeout_s`.

    Call it once the process groups are made: it finds the connections that are there. Returns how many they are. Linux.
    """
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if os.readlink(entry).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    if _leads_elsewhere(connection):
                        _set_timeout(connection, timeout_s)
                        found += 1
    return found


def _leads_elsewhere(connection: socket.socket) -> bool:
    """Whether this is a TCP connection to an address other than this process's own end's."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    here, there = (
        ipaddress.ip_address(end()[0].partition("%")[0]) for end in (connection.getsockname, connection.getpeername)
    )
    return here != there


def _set_timeout(connection: socket.socket, timeout_s: int) -> None:
    pause_s = max(1, timeout_s // NUM_PROBES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # while nothing is under way
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_s * 1000)  # while something is
