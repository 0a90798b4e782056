"""A machine that answers is never taken for a lost one, however long its program leaves what it is sent unread."""

from __future__ import annotations

import socket
import time

from megatron_fipo.connections import NUM_PROBES, notice_lost_machines

TIMEOUT_S = 1


def test_a_peer_that_reads_nothing_for_longer_than_the_time_out_is_not_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0))
        theirs, _ = listener.accept()
    with ours, theirs:
        assert notice_lost_machines(TIMEOUT_S) >= 2
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == max(1, TIMEOUT_S // NUM_PROBES)
        ours.setblocking(False)
        num_sent = 0
        began = time.monotonic()
        while time.monotonic() - began < 2.0 * TIMEOUT_S:
            try:
                num_sent += ours.send(b"x" * (1 << 16))
            except BlockingIOError:  # its window is closed
                time.sleep(0.05)
        theirs.settimeout(5.0)
        num_read = 0
        while num_read < num_sent:
            data = theirs.recv(1 << 20)
            assert data, f"broken after {num_read} of {num_sent} bytes"
            num_read += len(data)
