"""The index of a set of tars: after it is built, every sample is one positioned read.

One safetensors file beside the tars. Per sample: offset and length of the image inside its tar, label, crc32,
width and height (24 bytes; 31 MB for ImageNet). Per shard: the number of its first sample and its size.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from dist_trainer.errors import UserError

VERSION = 1
FILE_NAME = "index.dtx"
SAMPLE = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("crc32", "<u4"), ("width", "<u2"), ("height", "<u2")]
)


@dataclass(frozen=True)
class ShardIndex:
    """`samples` is a structured array of SAMPLE in shard order; shard i holds samples first[i]:first[i + 1]."""

    root: Path
    shards: tuple[str, ...]
    sizes: npt.NDArray[np.uint64]
    first: npt.NDArray[np.uint64]
    samples: npt.NDArray[np.void]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Samples per shard (int64)."""
        counts: npt.NDArray[np.int64] = self.first[1:].astype(np.int64) - self.first[:-1].astype(np.int64)
        return counts

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the samples are, independent of where they lie."""
        digest = hashlib.sha256(str(VERSION).encode())
        for array in (self.samples, self.first, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(json.dumps(self.class_names).encode())
        return digest.hexdigest()

    def shard_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard number of each sample id (int64)."""
        return np.searchsorted(self.first.astype(np.int64), ids, side="right").astype(np.int64) - 1

    def describe(self, sample: int) -> str:
        """`shard.tar, sample 7 at byte 512`: for messages about one sample."""
        shard = int(self.shard_of(np.array([sample]))[0])
        place = int(self.samples["offset"][sample])
        return f"{self.root / self.shards[shard]}, sample {sample - int(self.first[shard])} at byte {place}"

    def save(self, path: Path) -> None:
        """Write atomically: an index that exists is whole."""
        arrays = {name: np.ascontiguousarray(self.samples[name]) for name in SAMPLE.names or ()}
        arrays |= {"shard_first": self.first, "shard_size": self.sizes}
        metadata = {
            "format": f"dist_trainer index {VERSION}",
            "shards": json.dumps(self.shards),
            "class_names": json.dumps(self.class_names),
            "fingerprint": self.fingerprint,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(arrays, temporary, metadata=metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Read an index and hold it against the tars. Raises UserError for one that is damaged or out of date."""
        try:
            with safe_open(path, framework="np") as file:
                metadata: dict[str, str] = file.metadata() or {}
                arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != f"dist_trainer index {VERSION}":
                raise UserError(f"{path}: not an index of version {VERSION}; delete it and run the command again")
            samples = np.empty(len(arrays["offset"]), SAMPLE)
            for name in SAMPLE.names or ():
                samples[name] = arrays[name]
            index = cls(
                root=path.parent,
                shards=tuple(json.loads(metadata["shards"])),
                sizes=arrays["shard_size"],
                first=arrays["shard_first"],
                samples=samples,
                class_names=tuple(json.loads(metadata["class_names"])),
            )
            if index.fingerprint != metadata["fingerprint"]:
                raise UserError(f"{path}: damaged index (its fingerprint differs); delete it and run the command again")
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own exception type, JSON and NumPy theirs
            raise UserError(f"{path}: damaged index ({error}); delete it and run the command again") from None
        for shard, size in zip(index.shards, index.sizes, strict=True):
            tar = index.root / shard
            if not tar.exists():
                raise UserError(
                    f"{tar}: missing, though {path.name} lists it; restore it, or delete {path} to index anew"
                )
            if tar.stat().st_size != int(size):
                raise UserError(
                    f"{tar}: {tar.stat().st_size} bytes, but {path.name} says {int(size)}; "
                    f"restore it, or delete {path} to index anew"
                )
        return index
