"""The index of a set of images. With it, every sample is one positioned read.

One safetensors file, mapped into memory. Per sample 24 bytes (31 MB for ImageNet): offset and length of the image
inside its shard, label, crc32, width and height. Per shard: the number of its first sample, its size, its time of
change or ETag. A shard is a tar; of an image folder it is a class folder, and then each sample has a file name.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dist_trainer.data.listing import LISTING
from dist_trainer.data.texts import Texts
from dist_trainer.errors import LocalError, UserError
from dist_trainer.storage.atomic import replacing

VERSION = 2
FILE_NAME = "index.dtx"
SAMPLE = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("crc32", "<u4"), ("width", "<u2"), ("height", "<u2")]
)
BAD = -1
"""The label of a sample that is known to be bad: it keeps its number and does not count in training."""


@dataclass(frozen=True)
class Problem:
    """A fault in a shard: its byte and its description. `sample` is its number in the index, if it has one."""

    shard: str
    offset: int
    reason: str
    sample: int | None = None

    def __str__(self) -> str:
        return f"{self.shard}: at byte {self.offset}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """`samples` is a structured array of SAMPLE in shard order; shard i holds samples first[i]:first[i + 1]."""

    root: str
    """Local folder or URL that the shards' names are relative to."""
    shards: tuple[str, ...]
    stamps: tuple[str, ...]
    """Time of change or ETag of each shard when it was indexed; "" where the storage has none."""
    sizes: npt.NDArray[np.uint64]
    first: npt.NDArray[np.uint64]
    samples: npt.NDArray[np.void]
    class_names: tuple[str, ...]
    label_rule: str = "cls"
    """Where the labels are, as `shards index --label` writes it."""
    problems: tuple[Problem, ...] = ()
    """Bad samples that were accepted when the index was built; each has a row with the label BAD."""
    names: Texts | None = None
    """Of an image folder: each sample's file, relative to its class folder. None for tars."""
    sources: Texts | None = None
    """Of tars that `shards pack` wrote: each sample's file as it was named before. "" where it had no name."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files beside the images are none, by suffix."""
    listing: int = LISTING
    """Of an image folder: by which rules its files were listed (data/listing.py)."""
    path: ClassVar[str] = ""
    """The local file that this was read from; "" for an index that was not loaded."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def location(self) -> str:
        """Its name in messages: its file, or the location of its shards."""
        return self.path or self.root

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Samples per shard (int64)."""
        counts: npt.NDArray[np.int64] = self.first[1:].astype(np.int64) - self.first[:-1].astype(np.int64)
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the samples, independent of their location."""
        digest = hashlib.sha256(str(VERSION).encode())
        for array in (self.samples, self.first, self.sizes):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update(json.dumps(self.class_names).encode())
        return digest.hexdigest()

    def shard_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard number of each sample id (int64)."""
        return np.searchsorted(self.first.astype(np.int64), ids, side="right").astype(np.int64) - 1

    def shard_path(self, shard: int) -> str:
        """Local path or URL of a shard."""
        name = self.shards[shard]
        return name if "://" in name or name.startswith("/") else f"{self.root}/{name}"

    def file_of(self, sample: int, shard: int) -> str:
        """Local path or URL of the file that holds `sample`: its tar, or its image in an image folder."""
        path = self.shard_path(shard)
        return path if self.names is None else f"{path}/{self.names[sample]}"

    def source_of(self, sample: int) -> str | None:
        """The name that its file had before it was packed, if that is known."""
        return (self.sources[sample] or None) if self.sources is not None else None

    def describe(self, sample: int) -> str:
        """`shard.tar, sample 7 at byte 512 (cat/1.jpg)`: for messages about one sample."""
        shard = int(self.shard_of(np.array([sample]))[0])
        if self.names is not None:
            return self.file_of(sample, shard)
        offset = int(self.samples["offset"][sample])
        source = f" ({name})" if (name := self.source_of(sample)) else ""
        return f"{self.shard_path(shard)}, sample {sample - int(self.first[shard])} at byte {offset}{source}"

    def save(self, path: Path) -> None:
        """Write atomically: an index that exists is whole. Raises OSError."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "samples": np.ascontiguousarray(self.samples).view(np.uint8).reshape(-1, SAMPLE.itemsize),
            "shard_first": self.first,
            "shard_size": self.sizes,
        }
        if self.names is not None:
            arrays |= {"names": self.names.data, "name_ends": self.names.ends}
        if self.sources is not None:
            arrays |= {"__source__": self.sources.data, "source_ends": self.sources.ends}
        metadata = {
            "format": f"dist_trainer index {VERSION}",
            "root": "." if Path(self.root) == path.absolute().parent else self.root,
            "shards": json.dumps(self.shards),
            "stamps": json.dumps(self.stamps),
            "class_names": json.dumps(self.class_names),
            "label_rule": self.label_rule,
            "problems": json.dumps([[p.shard, p.offset, p.reason, p.sample] for p in self.problems]),
            "left_out": json.dumps(self.left_out),
            "listing": str(self.listing),
            "fingerprint": self.fingerprint,
        }
        with replacing(path, shared=True) as temporary:
            try:
                save_file(arrays, temporary, metadata=metadata)
            except SafetensorError as error:  # an OSError in disguise
                raise OSError(errno.EIO, str(error), str(path)) from None

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> "ShardIndex":
        """Map an index into memory. Raises UserError for one that is damaged; `verify` reads all of it for that.

        Shards are not checked; shards/prepare.py does that.
        """
        try:
            metadata, arrays = _map(path)
            index = cls(
                # "." moves with the index: tars and their index may be copied together.
                root=str(path.absolute().parent) if metadata["root"] == "." else metadata["root"],
                shards=tuple(json.loads(metadata["shards"])),
                stamps=tuple(json.loads(metadata["stamps"])),
                sizes=arrays["shard_size"],
                first=arrays["shard_first"],
                samples=arrays["samples"].view(SAMPLE).reshape(-1),
                class_names=tuple(json.loads(metadata["class_names"])),
                label_rule=metadata.get("label_rule", "cls"),
                problems=tuple(Problem(*each) for each in json.loads(metadata["problems"])),
                names=Texts(arrays["names"], arrays["name_ends"]) if "names" in arrays else None,
                sources=Texts(arrays["__source__"], arrays["source_ends"]) if "__source__" in arrays else None,
                left_out=json.loads(metadata.get("left_out", "{}")),
                listing=int(metadata.get("listing", "1")),
            )
            index.__dict__["path"] = str(path)
            if verify and index.fingerprint != metadata["fingerprint"]:
                raise UserError(f"{path}: damaged index (its fingerprint differs); {_ANEW}")
            index.__dict__["fingerprint"] = metadata["fingerprint"]
        except UserError:
            raise
        except PermissionError:
            raise UserError(f"{path}: cannot be read: permission denied") from None
        except Exception as error:  # JSON, NumPy and the file system raise their own
            raise UserError(f"{path}: damaged index ({error}); {_ANEW}") from None
        return index

    def expect(self, fingerprint: str) -> "ShardIndex":
        """This index. Raises LocalError if it differs from the one that rank 0 opened."""
        if self.fingerprint != fingerprint:
            raise LocalError(f"{self.path}: is not the index that this run started with; start again")
        return self

    def __reduce__(self) -> Any:
        """Loader workers map the file themselves: 100 M samples are 2.4 GB that need not be copied."""
        if self.path:
            return _load_again, (self.path, self.fingerprint)
        return partial(ShardIndex, **{each.name: getattr(self, each.name) for each in fields(self)}), ()


_ANEW = "delete it and run the command again"


def _load_again(path: str, fingerprint: str) -> ShardIndex:
    return ShardIndex.load(Path(path), verify=False).expect(fingerprint)


def _map(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """(metadata, arrays mapped from the file) of a safetensors file; safetensors' own NumPy reader would copy them."""
    dtypes = {"U8": np.uint8, "U64": np.uint64}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    if metadata.get("format") != f"dist_trainer index {VERSION}":
        raise UserError(f"{path}: not an index of version {VERSION}; {_ANEW}")
    whole = np.memmap(path, np.uint8, "r")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > len(whole):
            raise ValueError("it is cut short")
        arrays[name] = np.asarray(whole[start:end]).view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays
