"""Benchmarks that nobody runs break unseen: each runs all its sides, and every documented command exists."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from running import ENVIRONMENT, ROOT

from dist_trainer.commands.main import COMMANDS, dispatch
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.values import keys_of

SCRIPTS = {
    # name: sides that must be named as having run
    "augment": ["crop, decoded and resized", "autoaugment", "grid_mask"],
    "averaging": ["EMA, ZeRO 0, against timm's ModelEmaV3", "EMA, ZeRO 3", "PreciseBN, against fvcore"],
    "checkpoint": ["ours, in the background", "torch async_save", "SIGKILL of a rank", "by another rank"],
    "engine": ["demo, bf16, ours, DDP", "demo, bf16, ours, ZeRO 3", "resnet18_64px, bf16, exact, ZeRO 2"],
    "gpu": [
        "checkpoints across ZeRO stages",
        "batch 4, ours, ZeRO 3",
        "batch 4, ours, DDP, compiled",
        "evaluation; save",
    ],
    "loader": ["uint8 against webdataset", "float32 against timm wds", "resume at 99%", "2 workers", "crc32"],
    "noisy_batch_norm": ["EMA, BN re-estimated", "average of the 3 best"],
    "order": ["200 k, window, 4096 ranks", "200 k, balanced", "index of 200 k, saved"],
    "region": ["11 of 11 crops have the bits of Pillow's", "decoded, resized, against torchvision"],
    "same_bits": ["the same bits on 1, 2, 3, 4 ranks"],
    "watching": ["W&B, no answer", "the same weights, however it is watched"],
    "tricks": ["base", "Mixup and CutMix, not at the end", "gradient checkpointing"],
}
MORE = {"gpu": ["--device", "cpu"]}
SHARED = {"few", "gpu_checks", "gpu_speed", "machine", "ours", "parts", "peers", "photographs", "steps"}


def test_every_benchmark_is_known_here() -> None:
    """Fails when a new one is not run below."""
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == SCRIPTS.keys() | SHARED


@pytest.mark.slow  # two minutes in all
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_side_of_a_benchmark_runs(name: str, whole_fashion: list[str]) -> None:
    """With --smoke: on little data, without figures. Fails when a side no longer fits the product or its peer."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke", *MORE.get(name, [])]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for side in SCRIPTS[name]:
        assert side in done.stdout
    assert not re.search(r"\d (ms|us|images/s)\b", done.stdout), "a smoke run shows no figures"


# The documents' commands


def documented() -> list[tuple[str, str]]:
    """(file, command) of every command in a bash block of the documents."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    commands = []
    for file in (*files, *sorted(ROOT.glob("dist_trainer/*/README.md"))):
        text = file.read_text().replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            parts = [part for line in block.splitlines() for part in line.partition("#")[0].split("&&")]
            commands += [(str(file.relative_to(ROOT)), part.strip()) for part in parts if part.strip()]
    return commands


@cache
def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command of dist-trainer says of its options."""
    with pytest.raises(SystemExit):
        dispatch([*command.split(), "--help"])
    return capsys.readouterr().out


def check(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Raises AssertionError for a command whose file, sub-command, target or option does not exist."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] in ("taskset", "torchrun"):
        start = next(n for n, word in enumerate(words) if word in ("python", "-m") or word.endswith(".py"))
        words = words[start:] if words[start] == "python" else ["python", *words[start:]]
    if words[0] == "srun":
        words = words[words.index("dist-trainer") :]
    program, *rest = words
    if rest[:2] == ["-m", "dist_trainer"]:
        program, rest = "dist-trainer", rest[2:]
    options = [word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        missing = [word for word in rest if "=" not in word and not re.search(rf"^{word}:", makefile, re.MULTILINE)]
        assert not missing, missing
    elif program == "python":
        source = "".join((ROOT / file).read_text() for file in (rest[0], "benchmarks/machine.py"))
        assert all(f'"--{option}"' in source for option in options), options
    elif program == "dist-trainer" and rest[0] in ("ls", "cp", "--help"):
        assert not options[rest[0] == "--help" :]
    elif program == "dist-trainer":
        shown = options_of(" ".join(rest[:2] if rest[0] in ("shards", "checkpoints") else rest[:1]), capsys)
        assert all(f"--{option}" in shown or option in CONFIG_KEYS for option in options), options
    elif program in ("launch/local.sh", "launch/node.sh"):
        assert (ROOT / program).is_file()
        assert rest[0] in COMMANDS
    elif program == "pytest":
        names = [word for before, word in zip(["", *rest], rest, strict=False) if before != "-m"]
        assert all(word.startswith("-") or (ROOT / word).exists() for word in names), rest
    else:
        assert program in ("pip", "sbatch", "rm"), f"what is {program}?"


CONFIG_KEYS = set(keys_of(TrainConfig))


def test_the_documents_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Files, targets, sub-commands and options, as they are written. Mutation: rename a benchmark or an option."""
    commands = documented()
    assert len(commands) > 30
    wrong = []
    for file, command in commands:
        try:
            check(command, capsys)
        except (AssertionError, FileNotFoundError) as error:
            wrong.append(f"{file}: {command}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
