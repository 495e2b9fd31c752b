"""Hosts of a network of their own: network namespaces on a bridge, each with a name, an address and a link (root)."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from running import Session


def missing() -> str:
    """Why there can be none here, or ""."""
    if os.getuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "unshare") if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: iproute2)"
    tried = subprocess.run(["unshare", "-n", "-u", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, env={"PATH": search_path()}, timeout=30)


class Host:
    """`name` resolves to its address on every host of its network."""

    def __init__(self, number: int, network: str) -> None:
        self.name, self.address = f"{network}h{number}", f"10.231.77.{10 + number}"
        self._cable = f"{network}v{number}"

    def plug_in(self, bridge: str) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self._cable, "master", bridge, "up")
        for command in (["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"]):
            ip("-n", self.name, *command)
        ip("-n", self.name, "link", "set", "eth0", "up")

    def link(self, state: str) -> None:
        """up or down"""
        ip("link", "set", self._cable, state)

    def start(self, argv: list[str], log: Path, folder: Path, *, before: str = "true", **environment: str) -> Session:
        """A program on this host, after the shell command `before` there."""
        script = f'hostname {self.name}; {before} && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "-u", "bash", "-c", script, "_", *argv]
        return Session(inside, log, folder=folder, **{"PATH": search_path(), **environment})

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.name)
        shutil.rmtree(Path("/etc/netns") / self.name, ignore_errors=True)


@contextlib.contextmanager
def hosts_on_a_network(count: int) -> Iterator[list[Host]]:
    network = f"dt{os.getpid() % 100000}"
    found, bridge = [Host(number, network) for number in range(1, count + 1)], f"{network}br"
    names = "".join(f"{host.address} {host.name}\n" for host in found)
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for host in found:
            (Path("/etc/netns") / host.name).mkdir(parents=True)
            (Path("/etc/netns") / host.name / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            host.plug_in(bridge)
        yield found
    finally:
        for host in found:
            host.remove()
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", bridge)
