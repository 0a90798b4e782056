"""Two machines as far as a program can tell: network namespaces with addresses, names and a wire of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("n1", "n2")
NETWORK = "10.213.47"


@dataclass(frozen=True)
class Node:
    """A namespace whose processes see their own host name and hosts file, and one interface besides loopback."""

    name: str  # the host's
    namespace: str
    address: str
    interface: str
    hosts: Path

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """The command that runs `words` on this node."""
        inside = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*enter, "bash", "-c", inside, "bash", self.name, str(self.hosts), *map(str, words)]

    def start(self, words: Sequence[str | Path], env: Mapping[str, str] | None = None, **more: Any) -> Any:
        """`words` as a process on this node, in a process group of its own."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "process_group": 0, **more}
        return subprocess.Popen(self.command(words), env={**os.environ, **(env or {})}, **options)

    def wire(self, state: str) -> None:
        """Pull this node's network cable ("down"), or put it back ("up")."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextlib.contextmanager
def two_nodes(directory: Path, tag: str = "mf") -> Iterator[tuple[Node, Node]]:
    """Nodes n1 and n2, joined by a veth pair. Nothing of this machine's own network is changed."""
    tag = f"{tag}{os.getpid() % 100000}"
    nodes = []
    for index, name in enumerate(NAMES, start=1):
        hosts = directory / f"hosts-{name}"
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{i} {other}" for i, other in enumerate(NAMES, start=1))]
        hosts.write_text("\n".join(lines) + "\n")
        nodes.append(Node(name, f"{tag}-{name}", f"{NETWORK}.{index}", f"{tag}v{index}", hosts))
    first, second = nodes
    with contextlib.ExitStack() as stack:
        for node in nodes:
            _ip("netns", "add", node.namespace)
            stack.callback(_ip, "netns", "del", node.namespace)
        _ip(
            *f"-n {first.namespace} link add {first.interface} type veth peer name {second.interface}".split(),
            *f"netns {second.namespace}".split(),
        )
        for node in nodes:
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.namespace, "link", "set", node.interface, "up")
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        yield first, second


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
