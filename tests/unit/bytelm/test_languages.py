"""Languages of documents: from a file's name to an angle, and how close translations lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qll import cli
from qll.bytelm.config import StreamConfig
from qll.bytelm.context import Context
from qll.bytelm.corpus import local_parts
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.documents import Document
from qll.bytelm.evaluate import bits_per_byte
from qll.bytelm.generate import generate_bytes
from qll.bytelm.languages import ids_of, language_of, number_of
from qll.bytelm.packed import PackedText, pack
from qll.bytelm.parallel import parallel_lines, parallel_retrieval
from qll.bytelm.phase import Phase
from qll.bytelm.rerank import log_probabilities
from qll.bytelm.sampling import SamplingOptions
from qll.bytelm.saved import load_lm, save_model
from qll.errors import IntegrityError, TextError, UsageError
from tests.unit.bytelm.byte_models import byte_model, randomise, settings, text

LANGUAGES = ("en", "de")


# -- names ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("name.en.txt", 1),
        ("name.de", 2),
        ("europarl.en-de.de", 2),
        ("de/name.txt", 2),
        ("de/part/name.txt", 2),
        ("de/en/name.txt", 1),  # the nearest folder
        ("de/name.en.txt", 1),  # the file's own name before any folder
        ("en.txt", 0),  # a name is not its ending
        ("garden/hidden.txt", 0),
        ("name.fr.txt", 0),
    ],
)
def test_the_language_of_a_file_is_in_its_name_or_its_folder(name, number):
    assert language_of(Path(name), LANGUAGES) == number


def test_languages_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.en.txt").write_text("some text. " * 100)
    with pytest.raises(TextError, match=r"--languages de: no document.*name\.de\.txt"):
        local_parts([tmp_path], languages=LANGUAGES)
    with pytest.raises(UsageError, match=r"--language: no language of this model.*en, de.*fr"):
        number_of("fr", LANGUAGES)
    with pytest.raises(UsageError, match="trained without --languages"):
        number_of("en", ())
    with pytest.raises(UsageError, match=r"--set stream\.phase=rotation"):
        StreamConfig(languages=LANGUAGES)
    for wrong in (("en", "en"), ("",), ("a/b",), tuple(map(str, range(256)))):
        with pytest.raises(UsageError, match=r"stream\.languages: not names of languages"):
            StreamConfig(phase="rotation", languages=wrong)


# -- the angle -----------------------------------------------------------------------------
def test_the_rotation_of_a_language_is_an_isometry_and_that_of_none_is_the_plain_one():
    plain, phase = Phase(settings("rotation")).double(), Phase(settings("languages")).double()
    assert not phase.language.any()  # every language starts like none
    randomise(phase)
    tensors = phase.state_dict()
    assert tensors.pop("language").abs().min() > 0
    plain.load_state_dict(tensors)
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    still = (torch.ones(3, 1), torch.zeros(3, 1))
    numbers = torch.tensor([[0, 1, 2], [2, 0, 1]])
    turned = phase(x, Context(0, still, numbers))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    other = plain(x, Context(0, still))
    assert torch.equal(phase(x, Context(0, still)), other)
    assert torch.equal(turned[numbers == 0], other[numbers == 0])
    difference = phase.angles(x, 0, numbers) - plain.angles(x, 0)
    expected = torch.cat((torch.zeros(1, 8).double(), phase.language))[numbers]
    torch.testing.assert_close(difference, expected)


@torch.no_grad()
def test_a_model_reads_texts_of_no_language_as_one_without_languages_does():
    model, plain = byte_model("languages"), byte_model("rotation")
    tensors = {n: t for n, t in model.state_dict().items() if not n.endswith("phase.language")}
    plain.load_state_dict(tensors)
    ids = text(2, 19)
    assert torch.equal(model(ids), plain(ids))
    german = ids + 256 * 2
    assert not torch.allclose(model(german), plain(ids))
    # a text in two languages: each byte has its own, and looks neither ahead nor aside
    mixed = torch.cat((ids[:, :9], german[:, 9:]), dim=1)
    assert torch.equal(model(mixed)[:, :9], plain(ids)[:, :9])
    assert torch.equal(model(torch.cat((german[:1], ids[1:])))[1], model(ids)[1])
    state, pieces = model.initial_state(2), []
    for piece in mixed.split((4, 1, 8, 6), dim=1):
        logits, state = model.step(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(mixed), rtol=0, atol=1e-9)


@torch.no_grad()
def test_writing_and_scoring_know_the_language():
    model, options = byte_model("languages").float(), SamplingOptions(temperature=0.0)
    written = bytes(generate_bytes(model, b"abc", 9, options, language=2))
    start = torch.tensor([[0, *b"abc", *written]])
    logits = model(start + 512)
    scores = log_probabilities(model, b"abc", [written], language=2)
    nats = logits[0, 3:-1].log_softmax(-1).gather(1, start[0, 4:, None]).sum()
    assert scores[0] == pytest.approx(nats.item(), abs=1e-3)
    assert scores[0] != pytest.approx(log_probabilities(model, b"abc", [written])[0], abs=1e-3)
    document = Document("a", b"abc" + written, language=2)
    bits = bits_per_byte(model, [ids_of(document)], context=64).bits
    nats = logits[0, :-1].log_softmax(-1).gather(1, start[0, 1:, None]).sum()
    assert bits[0] == pytest.approx(-nats.item() / np.log(2), rel=1e-5)


# -- packing -------------------------------------------------------------------------------
def test_packed_texts_keep_the_language_of_every_byte(tmp_path):
    documents = [
        Document("one", b"aaaa" * 40, language=1),
        Document("none", b"bbbb" * 40),
        Document("two", b"cccc" * 40, language=2),
    ]
    packed = PackedText(pack(documents, tmp_path / "packed"))
    whole = packed.ids(np.array([0]), len(packed))[0]
    expected = {ord("a"): 1, ord("b"): 0, ord("c"): 2}
    for byte, language in expected.items():
        assert set((whole[whole % 256 == byte] // 256).tolist()) == {language}
    assert (whole[whole % 256 == 0] // 256).tolist() == [1, 0, 2, 2]  # of what follows
    for document, found in zip(documents, packed.documents(), strict=True):
        assert np.array_equal(found, ids_of(document))

    windows = MemoryEfficientByteDataset(tmp_path / "packed", 16)
    inputs, targets = BatchLoader([windows], 8).next()
    assert inputs.max() > 256 > targets.max()
    assert torch.equal(inputs[:, 1:] % 256, targets[:, :-1])
    one, after = windows[0]
    assert torch.equal(one, inputs[0])
    assert torch.equal(after, targets[0])
    # the same bytes without languages
    plain = pack([Document(d.name, d.source) for d in documents], tmp_path / "plain")
    other = BatchLoader([MemoryEfficientByteDataset(plain, 16)], 8).next()
    assert torch.equal(inputs % 256, other[0])
    assert torch.equal(targets, other[1])


def test_damaged_languages_of_a_packed_text_are_refused(tmp_path):
    pack([Document("one", b"text", language=1)], tmp_path / "packed")
    beside = tmp_path / "packed.languages"
    for value in ("{}", '{"starts": [0, 3], "numbers": [1]}', '{"starts": [2], "numbers": [1]}'):
        beside.write_text(value)
        with pytest.raises(IntegrityError, match=r"not the languages of a packed text"):
            PackedText(tmp_path / "packed")


# -- translations --------------------------------------------------------------------------
def test_translations_are_found_where_states_are_alike():
    torch.manual_seed(0)
    model = byte_model("plain").float()
    generator = np.random.default_rng(0)
    lines = [generator.integers(97, 123, 12) for _ in range(20)]
    same = parallel_retrieval(model, lines, lines)
    assert same.byte_histogram == 1
    assert same.blocks == (1.0, 1.0)
    assert same.chance == pytest.approx(1 / 20)
    unrelated = [generator.integers(97, 123, 12) for _ in range(20)]
    other = parallel_retrieval(model, lines, unrelated)
    assert max(*other.blocks, other.byte_histogram) < 0.35


def test_lines_that_do_not_belong_together_are_refused(tmp_path):
    one, two = tmp_path / "a.en", tmp_path / "a.de"
    one.write_text("one\ntwo\n")
    two.write_text("eins\n")
    with pytest.raises(TextError, match="as many lines in one as in the other, found 2 and 1"):
        parallel_lines(one, two)
    one.write_text("one\n\n")
    two.write_text("eins\nzwei\n")
    with pytest.raises(TextError, match="too few lines"):
        parallel_lines(one, two)
    two.write_bytes(b"\xff\n")
    with pytest.raises(TextError, match=r"a\.de: cannot be read"):
        parallel_lines(one, two)


# -- the verbs -----------------------------------------------------------------------------
def test_a_run_with_languages_from_folders_to_writing(tmp_path, capsys):
    for language, words in (("en", "the cat and the dog. "), ("de", "die Katze und der Hund. ")):
        (tmp_path / "texts" / language).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "texts" / language / f"{number}.txt").write_text(words * (20 + number))
    run = tmp_path / "run"
    words = ["lm", "train", "--data", str(tmp_path / "texts"), "--out", str(run), "--max_steps"]
    words += ["2", "--seq_length", "16", "--batch_size", "2", "--languages", "en", "de"]
    small = ["d_model=16", "n_layers=1", "n_heads=2", "d_ff=16"]
    assert cli.main([*words, "--set", *small]) == 2
    assert "stream.phase=rotation" in capsys.readouterr().err
    assert cli.main([*words, "--set", *small, "stream.phase=rotation"]) == 0
    model = load_lm(run)
    assert model.config.stream.languages == LANGUAGES
    assert model.blocks[0].phase.language.abs().max() > 0  # it learns
    capsys.readouterr()

    pair = [tmp_path / f"pair.{language}" for language in LANGUAGES]
    pair[0].write_text("a cat\na dog\nred\n")
    pair[1].write_text("eine Katze\nein Hund\nrot\n")
    assert cli.main(["lm", "eval", "--model", str(run), "--parallel", *map(str, pair)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] > 0
    assert found["parallel"]["chance"] == pytest.approx(1 / 3)
    assert len(found["parallel"]["blocks"]) == 1
    assert cli.main(["lm", "eval", "--model", str(run), "--parallel", str(pair[0])]) == 2
    assert "--parallel: needs two texts" in capsys.readouterr().err

    words = ["lm", "generate", "--model", str(run), "--prompt", "a", "--max_new_tokens", "3"]
    assert cli.main([*words, "--language", "de"]) == 0
    assert cli.main([*words, "--language", "de", "--candidates", "2"]) == 0
    assert cli.main([*words, "--language", "fr"]) == 2
    assert "no language of this model" in capsys.readouterr().err
    words = ["lm", "train", "--dataset", "wikitext2", "--languages", "en", "--max_steps", "1"]
    words += ["--out", str(tmp_path / "other"), "--set", "stream.phase=rotation"]
    assert cli.main(words) == 2
    assert "--languages: are those of files" in capsys.readouterr().err


def test_languages_can_be_added_to_a_model_that_has_none(tmp_path, capsys):
    model = byte_model("rotation").float()
    save_model(tmp_path / "base", model)
    texts = tmp_path / "text.en.txt"
    texts.write_text("some text to go on with. " * 40)
    words = ["lm", "train", "--data", str(texts), "--out", str(tmp_path / "run"), "--checkpoint"]
    words += [str(tmp_path / "base"), "--languages", "en", "--max_steps", "1", "--batch_size", "2"]
    assert cli.main([*words, "--lr", "1e-30"]) == 0
    capsys.readouterr()
    tuned = load_lm(tmp_path / "run")
    ids = text(1, 9)
    torch.testing.assert_close(tuned(ids), model(ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(tuned(ids + 256), model(ids), rtol=0, atol=1e-5)
