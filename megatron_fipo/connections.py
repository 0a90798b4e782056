"""What the ranks' connections to each other do when a machine or a network goes away without a word.

A rank that ends closes its connections, and the others notice at once. A machine that loses its power or its network
closes nothing: a rank that waits for it would wait for as long as its collective may take, which for rank 0's rollouts
is days. gloo leaves TCP's own remedies off.

Only a machine that answers nothing counts as lost. One whose rank is slow, or suspended, may leave what it is sent
unread for as long as it likes: its kernel acknowledges, and answers probes. (TCP_USER_TIMEOUT would break that too.)
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import threading
import time
from pathlib import Path

NUM_PROBES = 4
_NUM_TRIED, _LAST_ANSWER = struct.Struct("=2x2B"), struct.Struct("=56xI")  # of linux/tcp.h's tcp_info
_TCP_INFO_BYTES = 104


def notice_lost_machines(timeout_s: int) -> int:
    """From now on a connection of this process to another machine breaks when that has not answered for `timeout_s`.

    Also one that is made later. Returns how many there are by now. Linux.
    """
    found = _visit(timeout_s)
    threading.Thread(target=_watch, args=(timeout_s,), daemon=True).start()
    return found


def _watch(timeout_s: int) -> None:
    while True:
        time.sleep(timeout_s / NUM_PROBES / 2)
        _visit(timeout_s)


def _visit(timeout_s: int) -> int:
    """See to every connection that there is. None is held on to: its owner may close it at any time."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    if _leads_elsewhere(connection):
                        found += 1
                        _probe_while_idle(connection, max(1, timeout_s // NUM_PROBES))
                        if _is_unanswered(connection, timeout_s):
                            connection.shutdown(socket.SHUT_RDWR)
    return found


def _leads_elsewhere(connection: socket.socket) -> bool:
    """Whether this is a TCP connection to an address other than this process's own end's."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        here, there = (
            ipaddress.ip_address(end()[0].partition("%")[0]) for end in (connection.getsockname, connection.getpeername)
        )
    except OSError:  # not connected
        return False
    return here != there


def _probe_while_idle(connection: socket.socket, pause_s: int) -> None:
    if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == pause_s:  # done before
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause_s)


def _is_unanswered(connection: socket.socket, timeout_s: int) -> bool:
    """Whether data, or a question whether there is room for some, has been sent again and again without an answer.

    Linux does not probe while something is under way, and would try for a quarter of an hour.
    """
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    num_tried = max(_NUM_TRIED.unpack_from(information))
    (unanswered_ms,) = _LAST_ANSWER.unpack_from(information)
    return num_tried >= 2 and unanswered_ms >= timeout_s * 1000
