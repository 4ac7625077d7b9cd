"""Headwater: published methods for the whole life of a pretrained model, as parts, compared with evidence."""

__version__ = "0.1.0"

__all__ = ["__version__"]
