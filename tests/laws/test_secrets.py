"""Keys and tokens that a run is given are in no file that it writes: planted, used, and searched for."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from cluster_jobs import ARGV, work_folder
from running import Session
from s3_server import CREDENTIALS, S3Server

PLANTED = {
    "LAB_KEY": "AKIAPLANTEDKEY000001",
    "LAB_SECRET": "planted/secret+0000000000000000000000002",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_planted00000000000000000000000003",
}

SLOWLY = [pytest.mark.slow]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3Server()
    server.upload("bucket")
    yield server
    server.stop()


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *ARGV, "--run.name=run", *more]


@pytest.mark.slow
def test_planted_secrets_are_in_no_file_of_the_run_its_mirror_or_its_log(tmp_path: Path, server: S3Server) -> None:
    """In storage_options by their variables, and in the environment; with W&B offline, and resumed.

    Mutations: save the resolved options; write the environment into env.json.
    """
    here = work_folder(tmp_path)
    options = f"{{key: env:LAB_KEY, secret: env:LAB_SECRET, endpoint_url: '{server.options['endpoint_url']}'}}"
    argv = command(f"--data.storage_options={options}", "--run.mirror=s3://bucket/runs", "--checkpoint.every=4step")
    argv += ["--wandb.mode=offline", "--log.tensorboard=true", "--log.csv=true", "--duration=20step"]
    without = dict.fromkeys(CREDENTIALS, "")
    for _ in range(2):
        session = Session(argv, here / "log", folder=here, **{**without, **PLANTED})
        assert session.wait() == 0, session.log.read_text()
        shutil.rmtree(here / "runs" / "run" / "checkpoints")
        (here / "runs" / "run" / "STATE").write_text("running\n")
    client = boto3.client("s3", **server.options)
    listed = client.list_objects_v2(Bucket="bucket")["Contents"]
    copied = {each["Key"]: client.get_object(Bucket="bucket", Key=each["Key"])["Body"].read() for each in listed}
    assert any("checkpoints" in key for key in copied)
    files = {str(file): file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert any(".wandb" in name for name in files) and any("env.json" in name for name in files)
    for where, data in {**files, **copied}.items():
        for name, secret in PLANTED.items():
            assert secret.encode() not in data, (name, where)


@pytest.mark.parametrize(
    "argument",
    [
        "--data.storage_options={key: PLANTED, secret: PLANTED}",
        pytest.param("--data.storage_options={endpoint_url: 'https://me:PLANTED@127.0.0.1:1'}", marks=SLOWLY),
        "--run.mirror=s3://me:PLANTED@bucket/runs",
        pytest.param("--run.dir=https://127.0.0.1:1/runs?X-Amz-Signature=PLANTED", marks=SLOWLY),
        pytest.param("--model.pretrained=https://127.0.0.1:1/w.safetensors?sig=PLANTED", marks=SLOWLY),
        pytest.param("--data.train=https://127.0.0.1:1/train?token=PLANTED", marks=SLOWLY),
    ],
)
def test_a_literal_secret_is_refused_before_anything_is_written(tmp_path: Path, argument: str) -> None:
    """In one line that does not show it. Mutation: look at storage_options alone."""
    here = work_folder(tmp_path)
    done = subprocess.run(command(argument), cwd=here, check=False, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "PLANTED" not in said
    assert re.search(r"secret", said)
    assert not (here / "runs").exists()


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    """All of a run folder's: a group reads what its umask lets it. Mutation: tempfile's 600."""
    here = work_folder(tmp_path)
    argv = command("--duration=4step", f"--run.mirror={here / 'mirror'}")
    done = subprocess.run(["bash", "-c", 'umask 027; exec "$@"', "-", *argv], cwd=here, check=False, timeout=120)
    assert done.returncode == 0
    seen = set[str]()
    for root in ("runs", "mirror"):
        for path in (here / root).rglob("*"):
            wanted = 0o750 if path.is_dir() else 0o640
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
            seen.add(path.suffix)
    assert {".safetensors", ".json", ".jsonl", ".yaml"} <= seen
    assert os.access(here, os.R_OK)
