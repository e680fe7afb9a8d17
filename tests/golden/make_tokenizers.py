"""Makes tokenizers.json: what llama.cpp answers for vocabularies that we read from GGUF files.

llama.cpp is asked by hand, it is no dependency: `pip install llama-cpp-python==0.3.36`, then
`python -m tests.golden.make_tokenizers`. Two small vocabularies are trained here and stored with
the answers, so that the test needs neither this script nor llama.cpp.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import gguf
import llama_cpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qll.load.source import embedded_path
from qll.load.text import builtin_texts

HERE = Path(__file__).parent
PRES = ["default", "llama-bpe", "smollm", "gpt-2", "qwen2", "tekken", "dbrx"]
METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BLOCKS = [(32, 126)] * 8 + [(9, 13), (0xA0, 0x17F), (0x370, 0x3FF), (0x600, 0x6FF), (0x300, 0x320)]
BLOCKS += [(0x4E00, 0x4F00), (0x1F600, 0x1F64F), (0x2000, 0x206F), (0xAC00, 0xAD00)]

TRAPS = [
    "",
    " ",
    "  ",
    "   ",
    "     a",
    "a  b   c    d",
    "\n",
    "\n\n",
    " \n \n  x",
    "\t\tif x:\n\t\t\ty",
    "2024",
    "a 12 b",
    "3.14159",
    "1,234,567.89",
    "x\u00b2 + y\u00b3",
    "\u0661\u0662\u0663",
    "  \n\n 5",
    "It's don't I'LL we'Ve they'D",
    "na\u00efve caf\u00e9",
    "\u4f60\u597d\u4e16\u754c",
    "\U0001f600 emoji \U0001f468\u200d\U0001f469",
    "https://a.b/c?d=e&f=1#g",
    "foo_bar(baz=[1,2])",
    "<|im_start|>user\nhi<|im_end|>",
    "one</s> two<s>three",
    "camelCase HTTPServer aBaB",
    "zqzq",
    "zqzq zqzq a/b//c\n/",
    "trailing space ",
    "\u00a0nbsp\u2003em",
    "a\u0301\u0302",
    "---***---",
    "def f(x):\n    return x**2  # square\n",
    "\x00\x01\x7f",
    "$5.00 <= 10^3 ~ |x|",
    "\u00bfQu\u00e9?",
]


def texts() -> list[str]:
    """Hand-picked traps, lines of prose, and random Unicode."""
    draw = random.Random(7)
    prose = builtin_texts()["python_topics_evaluation"].text
    prose_parts = [prose[i : i + 300] for i in range(0, 30000, 3000)]
    noise = []
    for _ in range(60):
        blocks = [draw.choice(BLOCKS) for _ in range(draw.randint(1, 40))]
        noise.append("".join(chr(draw.randint(*block)) for block in blocks))
    return TRAPS + prose_parts + noise


def train(pre_tokenizer, alphabet: list[str], size: int) -> tuple[list[str], list[list[str]]]:
    """Tokens by id and merges of a small BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    sources = [builtin_texts()["python_topics_calibration"].text[:120_000], "    " * 200]
    tokenizer.train_from_iterator(sources, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def byte_level_vocabulary() -> dict:
    """Merges that cross digits, spaces and punctuation, so that each split pattern matters."""
    loose = pre_tokenizers.Split(" zzz ", behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    sequence = pre_tokenizers.Sequence([loose, letters])
    tokens, merges = train(sequence, pre_tokenizers.ByteLevel.alphabet(), 1500)
    numbers = ["12", "20", "24", "2024", "123", "\u0120" + "2", "\u010a\u010a\u0120", "lC", "aB"]
    pairs = [("1", "2"), ("2", "0"), ("2", "4"), ("20", "24"), ("12", "3"), ("\u0120", "2")]
    pairs += [("\u010a", "\u010a"), ("\u010a\u010a", "\u0120"), ("l", "C"), ("a", "B")]
    for token in ["\u010a\u010a", *numbers]:
        if token not in tokens:
            tokens.append(token)
    known = {tuple(merge) for merge in merges}
    merges += [pair for pair in pairs if pair not in known]
    # no merge makes zqzq: only a vocabulary that takes whole parts first finds it
    tokens += ["zqzq", "<|im_start|>", "<|im_end|>"]
    return {"tokens": tokens, "merges": [" ".join(merge) for merge in merges]}


def sentencepiece_vocabulary() -> list[tuple[str, float, int]]:
    """Pieces (text, score, type) in the order of Llama 2: three specials, 256 bytes, the rest."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokens, merges = train(metaspace, list("\u00e9\u4f60"), 900)
    made = ["".join(merge) for merge in merges]
    runs = [METASPACE * n for n in (2, 4, 8, 3, 5)]
    made = [*runs, *(token for token in made if token not in runs)]
    alone = [token for token in tokens if len(token) == 1]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(token, -float(rank), 1) for rank, token in enumerate([*made, *alone])]
    return pieces


def ask(path: Path, prompts: list[str]) -> list[list[int]]:
    """llama.cpp's ids, special tokens recognised, BOS left out."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(p.encode(), add_bos=False, special=True) for p in prompts]


def write_gguf(path: Path, model: str, pre: str | None, vocabulary: dict) -> None:
    """A GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        getattr(writer, f"add_{add}")(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(vocabulary["bos"])
    writer.add_eos_token_id(vocabulary["eos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    prompts = texts()
    golden: dict = {"llama_cpp_python": llama_cpp.__version__, "texts": prompts}
    golden["smollm2"] = ask(embedded_path(), prompts)
    letters = byte_level_vocabulary()
    count = len(letters["tokens"])
    letters |= {"types": [1] * (count - 2) + [3, 3], "bos": count - 2, "eos": count - 1}
    pieces = sentencepiece_vocabulary()
    tokens, scores, types = (list(column) for column in zip(*pieces, strict=True))
    sentencepiece = {"tokens": tokens, "scores": scores, "types": types, "bos": 1, "eos": 2}
    golden["byte_level"] = letters | {"ids": {}}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRES:
            path = Path(folder, f"{pre}.gguf")
            write_gguf(path, "gpt2", pre, letters)
            golden["byte_level"]["ids"][pre] = ask(path, prompts)
        path = Path(folder, "spm.gguf")
        write_gguf(path, "llama", None, sentencepiece)
        golden["sentencepiece"] = sentencepiece | {"ids": ask(path, prompts)}
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
    (HERE / "tokenizers.json").write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
