"""`doctor` on two hosts that differ: in a version, in their clocks, in what they see."""

import os
from pathlib import Path

import pytest
from cluster_jobs import ENVIRONMENT, work_folder
from hosts import hosts_on_a_network, missing, search_path

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "they are there")


@pytest.mark.slow  # 20 s; test_doctor.py has the other crosses
def test_each_difference_between_hosts_is_a_cross_with_their_names(tmp_path: Path) -> None:
    """The second has another timm, a clock two minutes ahead, and other runs. Mutations: look at rank 0's alone."""
    here, odd = work_folder(tmp_path), tmp_path / "odd"
    (here / "runs").mkdir()
    (odd / "timm-0.0.1.dist-info").mkdir(parents=True)
    (odd / "timm-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    (odd / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 120\n")
    with hosts_on_a_network(2) as hosts:
        command = [
            "dist-trainer", "agent", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=doctor",
            f"--rdzv-endpoint={hosts[0].name}:29500", "-m", "dist_trainer", "doctor", "small.yaml",
        ]  # fmt: skip
        path = f"{ENVIRONMENT['PATH']}{os.pathsep}{search_path()}"
        first = hosts[0].start(command, here / "log-1", here, **{**ENVIRONMENT, "PATH": path})
        blind = f'unshare -m bash -c \'mount -t tmpfs none {here / "runs"} && exec "$@"\' _ "$@"'
        environment = {**ENVIRONMENT, "PATH": path, "PYTHONPATH": f"{odd}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
        second = hosts[1].start(["bash", "-c", blind, "_", *command], here / "log-2", here, **environment)
        said = lambda: first.log.read_text() + second.log.read_text()  # noqa: E731
        assert [first.wait(120), second.wait(120)] == [1, 1], said()
    lines = said().splitlines()
    crosses = [line for line in lines if line.startswith("✗")]
    one, two = hosts[0].name, hosts[1].name
    assert any("timm is " in line and one in line and two in line for line in crosses), said()
    assert f"✗ clocks: {one} is 120 s behind {two}: set up NTP or chrony on both" in crosses
    assert any(
        line.startswith("✗ run.dir: dt") and "does not see what rank 0 writes to runs" in line for line in crosses
    )
    assert any(line.startswith("✓ network: eth0, all-reduce ") or "network: eth0" in line for line in lines)
