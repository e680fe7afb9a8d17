"""The embedded model, opened once for all tests of the load room."""

from __future__ import annotations

import pytest

from qll.load.source import open_source
from qll.load.tokenizer import open_tokenizer


@pytest.fixture(scope="session")
def smollm2_source():
    return open_source(None)


@pytest.fixture(scope="session")
def smollm2(smollm2_source):
    """SmolLM2's tokenizer; tests must not change it."""
    return open_tokenizer(smollm2_source)
