"""`doctor`: this machine, or all ranks of this job, against what a run needs: one line each, with the fix."""

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_trainer.commands.ranks import ranks
from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.stream import cores_note, cores_of_host, num_workers
from dist_trainer.distributed.collectives import gather_json, on_main
from dist_trainer.distributed.world import World
from dist_trainer.engine.numerics import precision_note, set_numerics
from dist_trainer.errors import Outage, UserError, plural, readable_size
from dist_trainer.log.console import Terminal
from dist_trainer.log.wandb_run import reach
from dist_trainer.plan import num_slots
from dist_trainer.run.blueprint import Blueprint, make_blueprint
from dist_trainer.run.data import RunData, Streams, open_data, open_streams
from dist_trainer.run.measure import all_reduce_bytes_per_s, loader_images_per_s, step_seconds, storage_bytes_per_s
from dist_trainer.run.space import space_of
from dist_trainer.run_folder.environment import describe_environment
from dist_trainer.run_folder.owner import sees_file
from dist_trainer.storage.storage import RetryConfig, Storage

MAX_SKEW_S = 5.0
"""Between the clocks of two hosts. Signed requests to S3 fail at 15 minutes; logs are hard to compare before."""


@dataclass(frozen=True)
class Finding:
    """One line. `stops`: the run could not be made, or not be kept; otherwise it would be slow, or hard to follow."""

    is_good: bool
    line: str
    stops: bool = False

    def __str__(self) -> str:
        return f"{'✓' if self.is_good else '✗'} {self.line}"


def command(argv: list[str]) -> int:
    parser = new_parser("doctor", "This machine, or all ranks of this job, against what a run needs.")
    config, _ = parse_config(parser, argv)
    with ranks(120.0) as (world, terminal):
        stops = False
        for finding in findings(config, world):
            terminal.say(str(finding))
            stops |= finding.stops and not finding.is_good
        terminal.say("something would stop the run: mend what has a ✗" if stops else "ready to train")
    return 1 if stops else 0


def findings(config: TrainConfig, world: World) -> Iterator[Finding]:
    """In the order in which they are found; the same on every rank (collective)."""
    set_numerics(config.run.deterministic or config.engine.is_exact, config.engine.cpu_threads)
    yield versions(world)
    yield devices(config, world)
    yield clocks(world)
    yield on_rank_0(world, lambda: Finding(*reach(config.wandb)))
    folder = run_dir(config, world)
    yield folder
    yield from mirror(config, world)
    silent = Terminal(active=False)
    try:
        data = open_data(config, world, silent)
        blueprint = make_blueprint(config, data.train, data.num_classes, world.size, on_gpu=world.device.type == "cuda")
        streams = open_streams(config, data, blueprint.plan, blueprint.augment, world)
    except UserError as error:
        yield Finding(False, str(error), stops=True)
        return
    training = f"{len(data.train):,} training" if config.data.source == "index" else "training samples without an index"
    yield Finding(True, f"data: {training} and {len(data.val):,} validation samples")
    yield cores(config, world)
    size = 4 * sum(parameter.numel() for parameter in blueprint.model.parameters() if parameter.requires_grad)
    speed = all_reduce_bytes_per_s(world, size)
    yield from speeds(config, world, data, blueprint, streams, speed, can_write=folder.is_good)
    streams.close()


def on_rank_0(world: World, look: Callable[[], Finding]) -> Finding:
    return Finding(**on_main(world, lambda: vars(look())))


def per_host(world: World, value: Any) -> dict[str, Any]:
    """{host: value} of the hosts' first ranks, in the order of ranks (collective)."""
    everyone = gather_json(world, [socket.gethostname(), world.local_rank, value])
    return {host: value for host, local_rank, value in everyone if local_rank == 0}


def versions(world: World) -> Finding:
    packages = describe_environment(world.size)["packages"]
    mine = {"dist_trainer": packages.pop("dist_trainer"), "Python": platform.python_version(), **packages}
    hosts = per_host(world, mine)
    first, *others = hosts
    for host in others:
        for name, found in hosts[host].items():
            if found != hosts[first][name]:
                differ = f"versions: {name} is {hosts[first][name]} on {first} and {found} on {host}"
                return Finding(False, f"{differ}: install the same environment on every host", stops=True)
    return Finding(True, f"versions: {', '.join(f'{name} {found}' for name, found in hosts[first].items())}")


def devices(config: TrainConfig, world: World) -> Finding:
    is_gpu = world.device.type == "cuda"
    mine = torch.cuda.get_device_name(world.device) if is_gpu else f"{platform.machine()} CPU"
    names = gather_json(world, mine)
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    what = f"devices: {plural(world.size, 'rank')} on {plural(len(per_host(world, 0)), 'host')}: {kinds}"
    most = num_slots(config.batch)
    if world.size > most:
        return Finding(False, f"{what}; the batch feeds {most}: start {most}, or raise batch.global_batch", stops=True)
    if note := precision_note(config.engine.precision, world.device):
        return Finding(False, f"{what}; {note}")
    return Finding(True, what)


def clocks(world: World) -> Finding:
    if world.size > 1:
        dist.barrier()
    times = per_host(world, time.time())
    skew = max(times.values()) - min(times.values())
    if skew > MAX_SKEW_S:
        late, early = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
        return Finding(False, f"clocks: {late} is {skew:.0f} s behind {early}: set up NTP or chrony on both")
    return Finding(True, f"clocks: {f'{skew:.1f} s apart' if len(times) > 1 else 'one host'}")


def run_dir(config: TrainConfig, world: World) -> Finding:
    """That rank 0 can write where run folders are made, and all hosts see it."""
    root, token = config.run.root, f".doctor-{os.getpid()}-{time.time_ns()}"

    def write() -> str:
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / token).write_text(token)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"run.dir: cannot write {root}: {reason}; choose another --run.dir") from None
        return token

    try:
        name = on_main(world, write)
    except UserError as error:
        return Finding(False, str(error), stops=True)
    seen = per_host(world, world.local_rank > 0 or config.run.mirror_root is not None or sees_file(root / name))
    on_main(world, lambda: (root / token).unlink(missing_ok=True))
    if blind := [host for host, sees in seen.items() if not sees]:
        line = f"run.dir: {', '.join(blind)}: does not see what rank 0 writes to {root}"
        return Finding(False, f"{line}: name a folder that all hosts share", stops=True)
    return Finding(True, f"run.dir: {root} can be written{', and every host sees it' if len(seen) > 1 else ''}")


def mirror(config: TrainConfig, world: World) -> Iterator[Finding]:
    """That rank 0 can write, read and remove where run.mirror is, if there is one."""
    if config.run.mirror_root is None:
        return
    place = f"{config.run.mirror_root.rstrip('/')}/.doctor-{os.getpid()}-{time.time_ns()}"
    storage = Storage(config.data.storage_options, RetryConfig(timeout=10, deadline=10))

    def look() -> Finding:
        try:
            storage.write(place, b"doctor")
            storage.read(place)
            storage.remove(place)
        except (Outage, OSError) as error:
            return Finding(False, f"run.mirror: {' '.join(str(error).split())}", stops=True)
        return Finding(True, f"run.mirror: {config.run.mirror_root} can be written and read")

    yield on_rank_0(world, look)


def cores(config: TrainConfig, world: World) -> Finding:
    hosts = per_host(world, [cores_of_host(world), cores_note(config.data, world)])
    for host, (_, note) in hosts.items():
        if note:
            fix = "lower data.workers, start fewer ranks, or ask for more cores (--cpus-per-task)"
            return Finding(False, f"cores: {host}: {note.removeprefix('warning: ')}: {fix}")
    least = min(there for there, _ in hosts.values())
    workers = plural(num_workers(config.data, world), "loader process")
    return Finding(True, f"cores: {least} per host, for {plural(world.local_size, 'rank')} with {workers} each")


def speeds(
    config: TrainConfig,
    world: World,
    data: RunData,
    blueprint: Blueprint,
    streams: Streams,
    network: float | None,
    *,
    can_write: bool,
) -> Iterator[Finding]:
    """What is measured, against the step that uses it."""
    plan, batches, needed_on_disk = blueprint.plan, list[Batch](), space_of(config, blueprint).in_all

    def load() -> float:
        batches[:], speed = loader_images_per_s(streams.train, plan.micro_batch)
        return speed

    try:
        there = over_ranks(world, lambda: storage_bytes_per_s(config, data.train, world))
        loaded = over_ranks(world, load)
    except UserError as error:
        yield Finding(False, f"data: {error}", stops=True)
        return
    seconds, engine = step_seconds(config, blueprint, batches, world)
    used = plan.global_batch / seconds
    if network is not None:
        yield network_finding(config, blueprint, network, seconds)
    needed = used * float(data.train.sizes.sum()) / len(data.train)
    line = f"storage: {there / 1e6:,.0f} MB/s over all ranks; the step uses {needed / 1e6:,.1f}"
    yield Finding(there >= needed, line + ("" if there >= needed else ": cache it (data.cache.dir on a local disk)"))
    line = f"loader: {loaded:,.0f} images/s over all ranks; the step uses {used:,.0f}"
    fix = ": more cores per rank or data.workers, smaller images, data.cache"
    yield Finding(loaded >= used, line + ("" if loaded >= used else fix))
    if can_write:
        yield space(config, world, needed_on_disk)
    engine.close()


def over_ranks(world: World, measure: Callable[[], float]) -> float:
    """The sum of what the ranks measure at the same time (collective). Raises the first rank's UserError on all."""
    try:
        mine, problem = measure(), ""
    except UserError as error:
        mine, problem = 0.0, str(error)
    everyone = gather_json(world, [mine, problem])
    for _, line in everyone:
        if line:
            raise UserError(line)
    return float(sum(speed for speed, _ in everyone))


def network_finding(config: TrainConfig, blueprint: Blueprint, bytes_per_s: float, step_s: float) -> Finding:
    interface = os.environ.get("NCCL_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "")).removeprefix("=")
    size = 4 * sum(parameter.numel() for parameter in blueprint.model.parameters() if parameter.requires_grad)
    share = size / bytes_per_s / step_s
    line = f"network: {interface or 'the default interface'}, all-reduce {bytes_per_s / 1e9:.3g} GB/s; "
    line += f"the gradients of a step take {size / bytes_per_s * 1e3:,.1f} of its {step_s * 1e3:,.0f} ms"
    fix = ": set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to a faster one, or raise batch.global_batch"
    return Finding(share <= 0.5, line if share <= 0.5 else line + fix)


def space(config: TrainConfig, world: World, needed: int) -> Finding:
    root = config.run.root

    def look() -> Finding:
        free = shutil.disk_usage(root).free
        line = f"space: a run takes {readable_size(needed)} at most, and {readable_size(free)} are free in {root}"
        if free >= needed:
            return Finding(True, line)
        return Finding(False, line + ": make room, choose another --run.dir, or keep fewer", stops=True)

    return on_rank_0(world, look)
