"""What a checkpoint costs training: how long it stands still, how fast it goes on meanwhile, and a lost rank.

    python benchmarks/checkpoint.py [--quick] [--json FILE] [--rounds N]

The network is ResNet-50 with momentum and EMA, on the GPU where there is one. Ours, in the background and not, stands
against the bare copy to host memory, and against torch.save, DeepSpeed's save_checkpoint and torch.distributed's
async_save, which get the same tensors. Each save begins when the one before is on the disk. Then: training steps while
checkpoints are written without a pause; a rank of the demo killed; bytes of a checkpoint that each rank reads to go on.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from machine import SMOKE, Figures, figure, machine, parser, save, table

from dist_trainer.run_folder import checkpoint, tensor_files
from dist_trainer.run_folder.background import BackgroundWriter
from dist_trainer.run_folder.mirror import Mirror
from dist_trainer.storage.storage import Storage
from dist_trainer.tensors import State, bit_sums

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
READ = "DIST_TRAINER_BENCHMARK_READ"


def network() -> tuple[torch.nn.Module, torch.optim.Optimizer, State]:
    """ResNet-50 after a step (a small network in a test), its optimizer with momentum, its average."""
    build = torchvision.models.resnet18 if SMOKE else torchvision.models.resnet50
    model = build().to(DEVICE)  # DeepSpeed does not take channels_last
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    return model, optimizer, {name: value.detach().clone() for name, value in model.state_dict().items()}


class Sides:
    """Ways to save `tensors` into `folder`: each is called, then awaited outside the clock."""

    def __init__(self, folder: Path) -> None:
        model, optimizer, ema = network()
        self.model, self.optimizer, self.ema = model, optimizer, ema
        momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.tensors: dict[str, State] = {"model": weights, "optim": momentum, "ema": ema}
        self.folder, self.step = folder, 0
        self.background, self.at_once = (BackgroundWriter(folder, in_background=mode) for mode in (True, False))
        self.pending: Callable[[], Any] = lambda: None
        flat = [value for state in self.tensors.values() for value in state.values()]
        self.flat, pinned = flat, DEVICE.type == "cuda"
        self.host = [torch.empty_like(value, device="cpu", pin_memory=pinned) for value in flat]

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self.flat)

    def settle(self) -> None:
        self.pending()
        self.pending = lambda: None
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def copy(self) -> None:
        for there, here in zip(self.host, self.flat, strict=True):
            there.copy_(here, non_blocking=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def ours(self, writer: BackgroundWriter) -> None:
        """As run/saving.py: are all ranks' weights the same, copy, hand over."""
        bit_sums(self.tensors["model"].values()).tolist()
        self.step += 1
        root, step = self.folder / "ours", self.step
        writer.submit(
            "checkpoint", step, self.tensors, lambda copies: checkpoint.save(root, step, copies, {"step": step})
        )
        self.pending = writer.wait

    def torch_save(self) -> None:
        torch.save(self.tensors, self.folder / "torch.pt")

    def async_save(self) -> None:
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)
        future = dcp.async_save(self.tensors, checkpoint_id=str(self.folder / "dcp"))
        self.pending = future.result

    def deepspeed(self) -> Callable[[], None]:
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        os.environ["LOCAL_RANK"] = "0"  # as a launcher would
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)
        del os.environ["LOCAL_RANK"]

        def side() -> None:
            engine.save_checkpoint(str(self.folder / "deepspeed"), tag="last", client_state={"ema": self.ema})

        return side


@contextmanager
def one_process() -> Iterator[None]:
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}-store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def standing_still(sides: Sides, rounds: int, *, with_deepspeed: bool) -> Figures:
    """Seconds of each side's call, against the bare copy."""
    calls: dict[str, Callable[[], None]] = {
        "bare copy": sides.copy,
        "ours, in the background": lambda: sides.ours(sides.background),
        "ours, synchronous": lambda: sides.ours(sides.at_once),
        "torch.save": sides.torch_save,
        "torch async_save": sides.async_save,
    }
    if with_deepspeed:
        calls["DeepSpeed save_checkpoint"] = sides.deepspeed()

    def timed(call: Callable[[], None]) -> float:
        sides.settle()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for number in range(1 if SMOKE else rounds + 1):
        order.append(order.pop(0))
        for name in order:
            seconds = timed(calls[name])
            if number or SMOKE:
                times[name].append(seconds)
    sides.settle()
    medians = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    bare = medians.pop("bare copy")
    return {name: figure(seconds, bare) for name, seconds in medians.items()}


def to_a_mirror(sides: Sides) -> Figures:
    """From the call until a checkpoint is on the disk, and until it is in a mirror on an S3 server in another process
    (or, where there is none, in another folder)."""
    sides.settle()
    start = time.perf_counter()
    sides.ours(sides.background)
    sides.settle()
    local = time.perf_counter() - start
    rows = {"until it is on the disk": figure(local)}
    run = sides.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (sides.folder / "ours").rename(run / "checkpoints")
    with a_mirror(sides.folder) as (name, mirror):
        start = time.perf_counter()
        mirror.bring_up_to_date(run, checkpoint.ONLY_LAST)
        rows[f"and, behind it, {name}"] = figure(time.perf_counter() - start)
    return rows


@contextmanager
def a_mirror(folder: Path) -> Iterator[tuple[str, Mirror]]:
    try:
        import boto3
        import moto  # noqa: F401
        import s3fs  # noqa: F401
    except ImportError:
        yield "in another folder", Mirror(str(folder / "mirror"), Storage())
        return
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout is not None
        port = next(match[1] for line in server.stdout if (match := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        options = {"endpoint_url": f"http://127.0.0.1:{port}"}
        boto3.client("s3", **options).create_bucket(Bucket="bucket")
        yield "on S3 (moto)", Mirror("s3://bucket/run", Storage(options))
    finally:
        server.kill()


def training_meanwhile(sides: Sides, seconds: float) -> Figures:
    """Images/s while checkpoints are written one after another, against images/s without. Training stands still while
    one is handed over: that time is a figure of its own, above.
    """
    batch = 4 if DEVICE.type == "cpu" else 128
    images = torch.randn(batch, 3, 64 if DEVICE.type == "cpu" else 224, 64 if DEVICE.type == "cpu" else 224)
    images = images.to(DEVICE, memory_format=torch.channels_last)

    def steps(writes: bool) -> float:
        sides.settle()
        count, spent = 0, 0.0
        while spent < seconds or not count:
            if writes and not sides.background.is_busy():
                sides.ours(sides.background)
            start = time.perf_counter()
            sides.model(images).float().square().mean().backward()
            sides.optimizer.step()
            sides.optimizer.zero_grad()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            count += 1
            spent += time.perf_counter() - start
        return batch * count / spent

    steps(False)
    pairs = [(steps(True), steps(False)) for _ in range(1 if SMOKE else 3)]
    during, without = sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2]
    return {f"images/s while it is written, {torch.get_num_threads()} threads": figure(during, without, "images/s")}


def training_on_few_and_all(sides: Sides, seconds: float) -> Figures:
    """With a core to spare for the writer, as where a GPU does the work; and with training on every core."""
    every, figures = torch.get_num_threads(), Figures()
    for threads in sorted({max(1, every // 2), every}):
        torch.set_num_threads(threads)
        figures |= training_meanwhile(sides, seconds)
    return figures


def command(folder: Path, *more: str) -> list[str]:
    argv = ["--standalone", "--nproc-per-node=2", "--max-restarts=3", *more, "train", "configs/fashion_mnist.yaml"]
    return [sys.executable, "-m", "dist_trainer", "agent", *argv, "--wandb.mode=disabled", "--log.every=1step",
            f"--run.dir={folder}", "--run.name=run", "--eval.every=null", "--checkpoint.every=10step",
            "--lr.warmup.duration=10step"]  # fmt: skip


def lost_rank(folder: Path) -> Figures:
    """Seconds from SIGKILL of rank 1 of the demo to the first step that was not made before."""
    metrics = folder / "run" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command(folder, "-m", "dist_trainer"), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            before = wait_for(metrics, 25, process)
            (rank,) = [pid for pid in children(process.pid) if b"RANK=1" in environment_of(pid)]
            start = time.perf_counter()
            os.kill(rank, signal.SIGKILL)
            before = max(before, last_step(metrics))
            time.sleep(0.5)  # what rank 0 still wrote belongs to before
            wait_for(metrics, max(before, last_step(metrics)) + 1, process)
            return {"SIGKILL of a rank, until the next new step": figure(time.perf_counter() - start)}
        finally:
            process.terminate()
            process.wait(120)


def last_step(metrics: Path) -> int:
    steps = re.findall(r'^{"step": (\d+)', metrics.read_text(), re.MULTILINE) if metrics.exists() else []
    return int(steps[-1]) if steps else 0


def wait_for(metrics: Path, step: int, process: "subprocess.Popen[bytes]") -> int:
    while (last := last_step(metrics)) < step:
        if process.poll() is not None:
            sys.exit(f"the run ended:\n{(metrics.parent.parent / 'log').read_text()[-2000:]}")
        time.sleep(0.02)
    return last


def children(pid: int) -> list[int]:
    return [
        int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()
    ]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def bytes_read(folder: Path) -> Figures:
    """Of the checkpoint's files, by each rank that goes on: digests, then tensors."""
    run, read = folder / "run", folder / "read"
    (read).mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", READ: str(read)}
    argv = command(folder, str(Path(__file__).resolve()))
    argv += [f"--duration={last_step(run / 'metrics.jsonl') + 5}step", '--run.allow_change=["duration"]']
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    counted = [sum(map(int, (read / rank).read_text().split())) if (read / rank).exists() else 0 for rank in "01"]
    return {"read to go on, by rank 0": figure(counted[0], unit="B"), "by another rank": figure(counted[1], unit="B")}


def counting_rank() -> None:
    """A rank that counts what it reads of checkpoints until it trains."""
    from dist_trainer.commands import train as command_train
    from dist_trainer.commands.main import main as rank_main

    log, trains, loop = Path(os.environ[READ]) / os.environ["RANK"], list[bool](), command_train.train

    def counting_ends(run: Any) -> str | None:
        trains.append(True)
        return loop(run)

    command_train.train = counting_ends
    for name in ("digest", "read_tensors"):
        function = getattr(tensor_files, name)

        @functools.wraps(function)
        def counted(path: Path, function: Callable[[Path], Any] = function) -> Any:
            if not trains:
                with log.open("a") as out:
                    out.write(f"{path.stat().st_size}\n")
            return function(path)

        setattr(checkpoint, name, counted)
    rank_main(sys.argv[1:])


def main() -> None:
    options = parser(__doc__, "fewer rounds; without DeepSpeed, whose first save takes long, and without a lost rank")
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args()
    print(machine())
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as place, one_process():
        sides = Sides(Path(place))
        title = f"seconds that training stands still, {sides.num_bytes / 1e6:.0f} MB"
        rows = standing_still(
            sides, 2 if arguments.quick else arguments.rounds, with_deepspeed=SMOKE or not arguments.quick
        )
        table(title, rows, "bare copy")
        rest = to_a_mirror(sides) | training_on_few_and_all(sides, 0.1 if SMOKE else 2 if arguments.quick else 6)
        table("behind training", rest, "without")
        figures |= rows | rest
    if SMOKE or not arguments.quick:
        with tempfile.TemporaryDirectory() as place:
            rows = lost_rank(Path(place)) | bytes_read(Path(place))
            table("a lost rank of the demo", rows, "")
            figures |= rows
    save(arguments.json, figures)


if __name__ == "__main__":
    counting_rank() if READ in os.environ else main()
