"""A whole tiny checkpoint (weights and tokenizer) and a way to run the command line on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = ("--calib_tokens", "512", "--eval_tokens", "512", "--context", "128")
QUICK += ("--refine_tokens", "2048")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face folder with the tiny Llama and a byte-level BPE of its 512 tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from qll.load import builtin_texts
    from tests.conftest import VOCAB, make_tiny_llama

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_tiny_llama().save_pretrained(folder)
    raw = ByteLevelBPETokenizer()
    text = builtin_texts()["python_topics_calibration"].text[:200_000]
    specials = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator([text], vocab_size=VOCAB, special_tokens=specials, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def run_qll(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`python main.py WORDS` in a fresh process, as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"},
        check=False,
    )
