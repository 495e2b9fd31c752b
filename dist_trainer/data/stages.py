"""The user's own per-sample stages, run as a webdataset pipeline over our samples."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dist_trainer.by_name import resolve
from dist_trainer.draws import STAGE, UInt64, hashes
from dist_trainer.errors import UserError

Sample = dict[str, Any]
"""`__key__` (sample number), `image` (encoded bytes), `cls` (class number). A stage may put decoded pixels, uint8
[C, H, W], in place of the bytes, and another class number."""


class Stages:
    """`data.stages`: each a function from Sample to Sample that neither drops, adds nor reorders samples.

    Python's, NumPy's and torch's generators are seeded by the sample's key while its stages run, and restored.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UserError for a name that cannot be imported."""
        self._names = list(names)
        self._functions: list[Callable[[Sample], Sample]] | None = None
        self._open()

    def __bool__(self) -> bool:
        return bool(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": None}  # a loader worker imports them itself

    def _open(self) -> list[Callable[[Sample], Sample]]:
        if self._functions is None:
            self._functions = [resolve(f"data.stages[{n}]", name, {}, "stage") for n, name in enumerate(self._names)]
        return self._functions

    def __call__(self, samples: Sequence[Sample], keys: UInt64) -> list[Sample]:
        """The samples after all stages, in order. Raises UserError for a stage that fails or loses a sample."""
        import webdataset  # only if there are stages

        seeds = hashes(keys, STAGE).tolist()

        def source() -> Iterator[Sample]:
            for sample, seed in zip(samples, seeds, strict=True):
                seed_all(seed)  # a sample passes all stages before the next one is asked for
                yield sample

        pipeline = webdataset.DataPipeline(
            source, *(webdataset.map(function, handler=webdataset.reraise_exception) for function in self._open())
        )
        try:
            with random_state_kept():
                done = list(pipeline)
        except Exception as error:  # a user's stage may raise anything
            raise UserError(f"data.stages: {type(error).__name__}: {error}") from None
        before = [sample["__key__"] for sample in samples]
        after = [sample.get("__key__") if isinstance(sample, dict) else None for sample in done]
        if before != after:
            raise UserError(
                f"data.stages: {len(before)} samples went in, {len(after)} came out, or in another order; "
                "a stage maps each sample to one and keeps its __key__"
            )
        return done


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, for user code that may draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)
