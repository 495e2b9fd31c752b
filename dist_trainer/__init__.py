"""Train ImageNet classifiers on one machine or on many: right, and fast."""

__version__ = "0.1.0"
