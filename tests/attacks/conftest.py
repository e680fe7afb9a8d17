"""The command-line attacks start from the same whole tiny checkpoint as the end-to-end tests."""

from tests.e2e.conftest import tiny_checkpoint

__all__ = ["tiny_checkpoint"]
