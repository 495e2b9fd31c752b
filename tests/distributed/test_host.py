"""This host: its cores, its addresses, its interfaces."""

import os
import socket
from pathlib import Path

import pytest

from dist_trainer.distributed import network
from dist_trainer.distributed.cores import cores
from dist_trainer.distributed.network import interface_of, is_own, own_address

MASK = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/box\n", {"box/cpu.max": "50000 100000"}, 1),
        ("0::/pod/box\n", {"pod/cpu.max": "50000 100000", "pod/box/cpu.max": "max 100000"}, 1),
        ("0::/not/mounted/here\n", {"cpu.max": "90000 100000"}, 1),
        ("0::/box\n", {"box/cpu.max": f"{MASK + 5}00000 100000"}, MASK),
        ("0::/box\n", {"box/cpu.max": "max 100000"}, MASK),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, MASK),
        ("4:memory:/box\n", {"cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000"}, MASK),
        ("nothing\n".replace("nothing", "1:name=systemd:/"), {}, MASK),
    ],
)
def test_a_quota_of_time_counts_as_cores(tmp_path: Path, own: str, files: dict[str, str], expected: int) -> None:
    """Of the group or of one above it, in either version; never more than the mask.

    Mutations: read the mask alone; the own group alone; round down.
    """
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert cores(tmp_path / "groups", tmp_path / "own") == expected
    assert cores(tmp_path / "groups", tmp_path / "absent") == MASK


def test_loopback_is_ours_and_a_stranger_is_not() -> None:
    """Mutations: compare names; take every name that resolves for our own."""
    assert is_own("127.0.0.1") and is_own("localhost") and own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert not is_own(network.ELSEWHERE) and not is_own("no-such-host.invalid")
    with pytest.raises(OSError):
        own_address("no-such-host.invalid")


def test_a_host_whose_name_is_loopback_is_reached_by_its_own_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts: other hosts cannot use 127.0.1.1. Mutation: hand it to them."""
    resolve = socket.getaddrinfo

    def debian(host: str, *args: object, **more: object) -> object:
        return resolve("127.0.1.1" if host == "box" else host, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", debian)
    assert is_own("box")
    try:
        expected = own_address(network.ELSEWHERE)
    except OSError:  # no network here
        expected = "127.0.1.1"
    assert own_address("box") == expected
