"""The config of data/."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dist_trainer.data.stages import Stages
from dist_trainer.errors import Form, NotNegative, Positive, UserError
from dist_trainer.plan import Tail
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig
from dist_trainer.storage.secret import refuse_secrets

PixelMean = Annotated[float, Form("a number from 0 to 1", lambda value: 0 <= value <= 1)]
PixelStd = Annotated[float, Form("a number above 0, such as 0.229", lambda value: value > 0)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which order, and how it is decoded."""

    train: str
    """Training images: a folder of tars or of class folders, one tar, a brace pattern, an index file; paths or URLs."""
    val: str
    """Validation images, likewise."""
    classes: str | None = None
    """A file with all class names, a line for each, in the order of their numbers, or a run's classes.json; null: those
    that training has."""
    source: Literal["index", "stream"] = "index"
    """index: every sample exactly once, in one order on any world. stream: training tars (image and .cls) are read from
    end to end by webdataset; then none of this is guaranteed, and data.num_samples must give their number."""
    num_samples: Positive | None = None
    """Training samples, where source is stream."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per rank. auto: the cores that this job may use, less one per rank."""
    order: Literal["auto", "window", "full", "balanced", "none"] = "auto"
    """window mixes blocks of neighbouring samples, full permutes every sample, balanced shows the classes equally
    often, none keeps the tars' order. auto: full where the tars are sorted by class, otherwise window."""
    tail: Tail = "mask"
    """What fills the last batch of an epoch: samples that do not count, the next epoch's first, or no such batch."""
    stages: list[str] = field(default_factory=list)
    """Your own per-sample stages, package.module:function, each from a dict to a dict, run as webdataset stages."""
    channels: Literal[1, 3] = 3
    """Decode to grey (1) or RGB (3)."""
    preprocess: Literal["auto", "imagenet", "model"] = "auto"
    """How open keys are filled. model: mean, std, eval.resize, eval.crop, augment.crop and their interpolation as the
    weights need them that timm or torchvision publish for model.name. imagenet: ImageNet's mean and std, no resizing.
    auto: model where model.pretrained is true or a tag, else imagenet."""
    mean: list[PixelMean] = field(default_factory=list)
    """Per channel, of pixels in [0, 1]; empty: as data.preprocess says."""
    std: list[PixelStd] = field(default_factory=list)
    """Per channel, of pixels in [0, 1]; empty: as data.preprocess says."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether images are turned as their EXIF orientation says. ignore: as timm and torchvision train."""
    max_pixels: Positive = 178_956_970
    """Width times height up to which an image is decoded; a larger one is a bad sample. Default: Pillow's limit."""
    max_bad: NotNegative | Literal["auto"] = "auto"
    """Stop when more different samples than this were bad. auto: one in 10,000, at least 10."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    storage_options: dict[str, Any] = field(default_factory=dict)
    """For fsspec, such as {endpoint_url: ...}. No secrets: they belong in the environment or in files such as ~/.aws.
    """

    def check(self) -> None:
        """Raises UserError for impossible values."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise UserError(f"data.{name}: {values} has {len(values)} values for data.channels: {self.channels}")
        if self.source == "stream" and not self.num_samples:
            raise UserError("data.num_samples: is required with data.source: stream, which has no index to count them")
        if self.source == "stream" and (self.stages or self.order != "auto"):
            key = "data.stages" if self.stages else "data.order"
            raise UserError(f"{key}: has no effect with data.source: stream; leave it out, or index the tars")
        Stages(self.stages)
        self.cache.check("data.cache")
        self.retry.check("data.retry")
        refuse_secrets("data.storage_options", self.storage_options)
