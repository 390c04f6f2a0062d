"""The version, written once for Python; MODULE.bazel states the same, and a test compares them."""

__version__ = "0.1.0"
