"""Many strings in one array: 1.28 M file names take 60 MB so, and 150 MB as Python objects."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Texts:
    """A sequence of strings: their UTF-8 bytes end to end, and where each ends."""

    data: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Bytes that are not UTF-8, which Python's file names hold as surrogates, are kept."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.uint64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.data[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))
