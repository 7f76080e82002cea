"""Distil big vision encoders from a cache of their features that proves its own integrity."""

__version__ = "0.1.0"
