"""Tokenizer files that lie: an error that names the file and the place, soon, and no code run."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import jinja2
import pytest

from qll.errors import CheckpointError, MissingFileError, TokenizerError
from qll.load.tokenizer import open_tokenizer
from qll.load.tokenizer_gguf import from_gguf_metadata
from tests.attacks.harness import mutations
from tests.unit.load.test_tokenizer import BYTES, metadata, rank_file, sentencepiece_file

RANKS = rank_file([*BYTES, b"ab", b"abc"])
PAYLOAD = "{{ ().__class__.__base__.__subclasses__() }}"


def tokenizer_json(size: int = 300) -> dict:
    """A small valid tokenizer.json."""
    backend = from_gguf_metadata(metadata("byte_level", pre="smollm")).backend_tokenizer
    content = json.loads(backend.to_str())
    model = content["model"]
    vocab = {token: index for index, token in enumerate(list(model["vocab"])[:size])}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
    model |= {"vocab": vocab, "merges": merges}
    for index, token in enumerate(content["added_tokens"]):
        token["id"] = size + index
    return content


def refused(path: Path, seconds: float = 5.0) -> str:
    """The message of the one error that may come out, which names the file and comes soon."""
    start = time.perf_counter()
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(path)
    assert time.perf_counter() - start < seconds
    message = str(caught.value)
    assert str(path.parent) in message
    assert len(message) < 1000
    return message


# --- Rank files -----------------------------------------------------------------------------

LIES = {
    "empty": ("", "impossible size"),
    "not base64": (RANKS.replace("YWI= 256", "YW!= 256"), "line 257"),
    "no rank": (RANKS.replace("YWI= 256", "YWI="), "line 257"),
    "negative rank": (RANKS.replace("YWI= 256", "YWI= -1"), "line 257"),
    "huge rank": (RANKS.replace("YWI= 256", "YWI= " + "9" * 5000), "line 257"),
    "unicode digit": (RANKS.replace("YWI= 256", "YWI= \u0662"), "line 257"),
    "rank twice": (RANKS.replace("YWI= 256", "YWI= 255"), "a rank stands twice"),
    "gap": (RANKS.replace("YWI= 256", "YWI= 999"), "no rank 256"),
    "token twice": (RANKS.replace("YWJj 257", "YWI= 257"), "twice"),
    "byte missing": (RANKS.replace("AA== 0", "AAA= 0"), "expected 256, found 255"),
    "empty token": (RANKS.replace("YWI= 256", "==== 256"), "line 257"),
    "long token": (RANKS.replace("YWI= 256", "A" * 4000 + " 256"), "impossible length"),
    "html": ("<html>404 not found</html>", "line 1"),
}


@pytest.mark.parametrize("lie", LIES)
def test_rank_file(lie, tmp_path):
    content, said = LIES[lie]
    (tmp_path / "tokenizer.model").write_bytes(content.encode())
    assert said in refused(tmp_path / "tokenizer.model")


def test_file_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        file.truncate(1 << 40)
    assert "impossible size" in refused(tmp_path / "tokenizer.model", seconds=1.0)
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    assert "impossible size" in refused(tmp_path / "tokenizer.json", seconds=1.0)


def test_git_lfs_pointer_says_so(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "tokenizer.model").write_text(pointer)
    with pytest.raises(MissingFileError, match="git lfs pull"):
        open_tokenizer(tmp_path)


# --- Anything but TokenizerError is a bug ---------------------------------------------------


def survive(path: Path, cases) -> Counter:
    """Opens and uses every case and counts what came out; other exceptions escape."""
    outcomes: Counter = Counter()
    for case in cases:
        path.write_bytes(case)
        start = time.perf_counter()
        try:
            tokenizer = open_tokenizer(path)
            tokenizer.decode(tokenizer("a b 12 \u4f60")["input_ids"])
            outcomes["opened"] += 1
        except CheckpointError as error:
            outcomes[type(error).__name__] += 1
        assert time.perf_counter() - start < 10
    return outcomes


def test_damaged_rank_files(tmp_path):
    outcomes = survive(tmp_path / "tokenizer.model", mutations(RANKS.encode(), 150, 1, 4000))
    assert outcomes["TokenizerError"] > 100


def test_damaged_sentencepiece_files(tmp_path):
    cases = mutations(sentencepiece_file(), 150, 2, 4000)
    outcomes = survive(tmp_path / "tokenizer.model", cases)
    assert outcomes["TokenizerError"] > 50
    assert outcomes["opened"] > 5


def test_sentencepiece_file_cut_anywhere(tmp_path):
    content = sentencepiece_file()
    cuts = (content[:cut] for cut in range(4, 400, 7))
    assert survive(tmp_path / "tokenizer.model", cuts)["opened"] == 0


def test_damaged_tokenizer_json(tmp_path):
    content = json.dumps(tokenizer_json()).encode()
    outcomes = survive(tmp_path / "tokenizer.json", mutations(content, 150, 3, 3000))
    assert outcomes["TokenizerError"] > 100


def test_tokenizer_json_with_values_of_the_wrong_kind(tmp_path):
    hand = random.Random(4)
    values = [None, -1, 2**63, 1e308, "", [], {}, True, {"type": "ByteLevel"}, [["a", "b"]]]

    def wrong(part):
        if isinstance(part, dict) and part and hand.random() < 0.85:
            key = hand.choice(list(part))
            return part | {key: wrong(part[key])}
        if isinstance(part, list) and part and hand.random() < 0.85:
            place = hand.randrange(len(part))
            return [*part[:place], wrong(part[place]), *part[place + 1 :]]
        return hand.choice(values)

    content = tokenizer_json()
    cases = (json.dumps(wrong(content)).encode() for _ in range(150))
    outcomes = survive(tmp_path / "tokenizer.json", cases)
    assert outcomes["TokenizerError"] > 100


def test_token_id_of_two_billion_is_refused_soon(tmp_path):
    # the tokenizers library would walk through all ids when it copies: a minute, or an hour
    content = tokenizer_json()
    content["model"]["vocab"]["far"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "impossible token id" in refused(tmp_path / "tokenizer.json", seconds=5.0)


# --- GGUF metadata --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("byte_level", "model", "bert", "gpt2 or llama"),
        ("byte_level", "model", None, "gpt2 or llama"),
        ("byte_level", "tokens", None, "no vocabulary list"),
        ("byte_level", "tokens", "abc", "no vocabulary list"),
        ("byte_level", "tokens", [1, 2], "another type"),
        ("byte_level", "tokens", ["a"] * 1513, "twice"),
        ("byte_level", "token_type", [1], "differ in length"),
        ("byte_level", "token_type", [9] * 1513, "unknown type"),
        ("byte_level", "merges", None, "no vocabulary list"),
        ("byte_level", "merges", ["ab"], "not two tokens"),
        ("byte_level", "merges", ["a b c"], "not two tokens"),
        ("byte_level", "merges", ["a zzzz"], "do not fit the vocabulary"),
        ("byte_level", "pre", {"a": 1}, "pre-tokenizer we do not know"),
        ("byte_level", "bos_token_id", 10**6, "not in the vocabulary"),
        ("byte_level", "eos_token_id", -1, "not in the vocabulary"),
        ("byte_level", "eos_token_id", "1", "not in the vocabulary"),
        ("sentencepiece", "scores", [float("nan")] * 1157, "not a number"),
        ("sentencepiece", "scores", [0.0], "differ in length"),
    ],
)
def test_gguf_vocabulary(name, key, value, said):
    keys = metadata(name, pre="smollm")
    keys[f"tokenizer.ggml.{key}"] = value
    count = len(metadata(name)["tokenizer.ggml.tokens"])
    if isinstance(value, list) and len(value) > 1000:
        keys[f"tokenizer.ggml.{key}"] = value[:1] * count
    with pytest.raises(TokenizerError, match=said):
        from_gguf_metadata(keys)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_token_of_a_megabyte_is_refused_soon(name):
    # all ways to cut it in two would be a terabyte of copies
    keys = metadata(name, pre="smollm")
    tokens = keys["tokenizer.ggml.tokens"]
    keys["tokenizer.ggml.tokens"] = ["x" * 1_000_000, *tokens[1:]]
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match="impossible length"):
        from_gguf_metadata(keys)
    assert time.perf_counter() - start < 2


# --- Nothing of the folder is run -----------------------------------------------------------


def folder_with(tmp_path: Path, **config) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_code_named_in_tokenizer_config_is_not_run(tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    open_tokenizer(folder_with(tmp_path, auto_map=auto_map, tokenizer_class="Evil"))("text")
    assert not trace.exists()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "gguf"])
def test_chat_template_is_carried_as_text_and_rendered_only_in_the_sandbox(place, tmp_path):
    if place == "gguf":
        keys = metadata("byte_level", pre="smollm") | {"tokenizer.chat_template": PAYLOAD}
        tokenizer = from_gguf_metadata(keys)
    elif place == "chat_template.jinja":
        (folder_with(tmp_path) / place).write_text(PAYLOAD)
        tokenizer = open_tokenizer(tmp_path)
    else:
        tokenizer = open_tokenizer(folder_with(tmp_path, chat_template=PAYLOAD))
    assert tokenizer.chat_template == PAYLOAD
    assert tokenizer.decode(tokenizer("text")["input_ids"]) == "text"
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 5},
        {"bos_token": {"content": 5}},
        {"additional_special_tokens": 5},
        {"additional_special_tokens": [1, None, "a"]},
        {"add_bos_token": "yes"},
        {"add_bos_token": True},
        {"chat_template": 7},
    ],
)
def test_special_tokens_of_the_wrong_kind_are_ignored(config, tmp_path):
    tokenizer = open_tokenizer(folder_with(tmp_path, **config))
    assert tokenizer.decode(tokenizer("text")["input_ids"]) == "text"


def test_special_token_that_is_not_text_is_refused(tmp_path):
    folder_with(tmp_path, bos_token="\ud800")
    assert "do not fit together" in refused(tmp_path / "tokenizer.json")
