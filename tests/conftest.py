"""A tiny random Llama (2 layers, d_model 64, 4 query and 2 key/value heads) shared by all tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# before torch starts its threads: waiting threads that spin slow down everything beside them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # as torch below: one thread for each worker
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# quimb, an oracle of small tests, would compile for a minute what runs once
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
# what this machine costs is measured once for all tests, and not in the user's own cache
os.environ.setdefault("QLL_CACHE", str(Path(tempfile.gettempdir()) / "qll_test_cache"))

import pytest
import torch

VOCAB = 512
# makers of golden files need packages that nothing else does
collect_ignore_glob = ["golden/*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Two threads, or one for each worker when tests run side by side."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def make_tiny_llama(tied: bool = False, seed: int = 0, **changes):
    """A transformers LlamaForCausalLM with random weights and random norm gains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.08,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tiny_hf_folder(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama as a Hugging Face safetensors folder (no tokenizer; load tests add one)."""
    folder = tmp_path_factory.mktemp("tiny_hf")
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_meta_folder(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama as Meta ships a model: consolidated.00.pth and params.json."""
    from tests.checkpoints import write_meta_folder

    return write_meta_folder(tiny_llama, tmp_path_factory.mktemp("tiny_meta"))


@pytest.fixture(scope="session")
def tiny_gguf_file(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama as a GGUF file in float32."""
    from tests.checkpoints import write_gguf

    return write_gguf(tiny_llama, tmp_path_factory.mktemp("tiny_gguf") / "tiny.gguf")
