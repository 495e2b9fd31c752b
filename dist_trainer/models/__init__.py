"""Networks by name."""

from dist_trainer.models.build import ModelConfig, build_model

__all__ = ["ModelConfig", "build_model"]
