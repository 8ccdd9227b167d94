"""Tokenizers: trained or local, they lose nothing and separate documents; and which are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from plans import planned, points
from texts import WORDS, documents_of, folder_source, stream

from sweeps.builds import read_meta
from sweeps.corpora import CorpusInfo, prepare
from sweeps.errors import InputError
from sweeps.tokenizers import load_tokenizer


def test_bpe_is_deterministic_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (folder / "trap.txt").write_text("this <|endoftext|> is text", encoding="utf-8")
    one = prepare(folder_source(folder), "bpe:320", tmp_path / "a")
    two = prepare(folder_source(folder), "bpe:320", tmp_path / "b")
    raw = prepare(folder_source(folder), "bytes", tmp_path / "a")
    assert one == two
    assert one.vocab_size == 320
    assert one.tokenizer.startswith("bpe-320-")
    # The same split and the same text: only the tokens differ.
    assert (one.validation_bytes, one.train_documents) == (raw.validation_bytes, raw.train_documents)
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "corpora" / one.fingerprint / "tokenizer.json"))
    for side in ("train", "validation"):
        tokens = stream(tmp_path / "a", one, side)
        assert tokens.dtype == np.uint16
        assert tokens[-1] == one.separator
        found = np.split(tokens, np.flatnonzero(tokens == one.separator) + 1)[:-1]
        decoded = [tokenizer.decode(list(ids[:-1])).encode() for ids in found]
        assert decoded == documents_of(stream(tmp_path / "a", raw, side), 0xFF)


def save_tokenizer(place: Path, eos: object) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    place.mkdir()
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: n + 2 for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


def test_a_local_tokenizer_separates_with_its_end_of_text_token(folder: Path, tmp_path: Path) -> None:
    (folder / "trap.txt").write_text("red </s> blue", encoding="utf-8")
    save_tokenizer(tmp_path / "words", {"content": "</s>"})
    info = prepare(folder_source(folder), str(tmp_path / "words"), tmp_path)
    assert (info.separator, info.vocab_size) == (1, len(WORDS) + 2)
    documents = info.train_documents + info.validation_documents
    ends = sum(int((stream(tmp_path, info, side) == 1).sum()) for side in ("train", "validation"))
    assert ends == documents == 61
    by_file = prepare(folder_source(folder), str(tmp_path / "words" / "tokenizer.json"), tmp_path)
    assert by_file.fingerprint == info.fingerprint


@pytest.mark.parametrize(
    ("eos", "complaint"), [(None, "declares no end-of-text token"), ("<no>", "does not contain"), ("red", "inside")]
)
def test_a_tokenizer_that_cannot_separate_is_refused(eos, complaint, folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "words", eos)
    with pytest.raises(InputError, match=complaint):
        prepare(folder_source(folder), str(tmp_path / "words"), tmp_path)


def hostile(place: Path, model: dict[str, object], **parts: object) -> str:
    """A tokenizer.json as a stranger may have written it, which declares "a" the end of a text."""
    place.mkdir()
    file = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    (place / "tokenizer.json").write_text(json.dumps(file | {"decoder": None, "model": model} | parts))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    return str(place)


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
PIECES = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


@pytest.mark.parametrize(
    ("model", "parts", "complaint"),
    [
        ({"type": "WordPiece", "vocab": {"a": 0}} | PIECES, {}, r"cannot encode this corpus: .*\[UNK\]"),
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, {}, r"cannot encode this corpus: .*\[UNK\]"),
        ({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}, {}, "cannot encode this corpus: .*unk_id"),
        (BPE, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read as a tokenizer"),
        (BPE, {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot encode this corpus: .*non-zero"),
        ({"type": "NoSuch"}, {}, "cannot be read as a tokenizer"),
    ],
)
def test_a_tokenizer_that_fails_or_panics_is_refused_with_what_it_said(
    model: dict[str, object], parts: dict[str, object], complaint: str, folder: Path, tmp_path: Path
) -> None:
    spec = hostile(tmp_path / "odd", model, **parts)
    with pytest.raises(InputError, match=complaint) as caught:
        prepare(folder_source(folder), spec, tmp_path)
    assert caught.value.field == ("tokenizer",)
    assert not list(tmp_path.glob("corpora/*"))


def test_tokens_that_lose_validation_text_are_counted_warned_of_and_give_no_bits_per_byte(
    folder: Path, tmp_path: Path
) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzñΩ漢字0123456789 \n#"
    declared = points({"size": 1e5, "tokens": 3840})

    def prepared(known: str) -> CorpusInfo:
        vocab = {letter: n for n, letter in enumerate(known)}
        spec = hostile(tmp_path / str(len(vocab)), BPE | {"vocab": vocab})
        (Path(spec) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "#"}))
        return prepare(folder_source(folder), spec, tmp_path)

    whole, without = prepared(letters), prepared(letters.replace("漢", ""))
    assert (whole.altered_documents, without.altered_documents) == (0, without.validation_documents)
    assert without.validation_tokens < whole.validation_tokens, "what it does not know is dropped in silence"
    assert whole.bits_per_byte(1.0) is not None
    assert without.bits_per_byte(1.0) is None
    complaint = "does not give back the text"
    assert not any(complaint in text for text in planned(declared, whole).warnings)
    (told,) = [text for text in planned(declared, without).warnings if complaint in text]
    assert without.tokenizer in told
    assert f"{without.validation_documents} of {without.validation_documents} validation documents" in told
    meta = (tmp_path / "corpora" / whole.fingerprint / "meta.json").read_text()
    assert "altered" not in meta, "an older Escala reads it"
    assert read_meta(tmp_path / "corpora" / without.fingerprint)[0] == without


def test_a_bpe_that_drops_merges_at_random_encodes_a_text_in_one_way(tmp_path: Path) -> None:
    model = BPE | {"vocab": {"a": 0, "b": 1, "c": 2, "bc": 3}, "merges": [["b", "c"]], "dropout": 0.5}
    encoder = load_tokenizer(hostile(tmp_path / "odd", model))
    assert encoder.encode(["bc" * 50])[0].tolist() == [3] * 50


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("byte", 'did you mean "bytes"'),
        ("gpt2", "not downloaded"),
        ("bpe:256", "from 257"),
        ("bpe:many", "from 257"),
        ("bpe:9000", "for only"),
        (".", "no tokenizer.json"),
    ],
)
def test_bad_tokenizers_are_named(spec: str, complaint: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=complaint):
        prepare(folder_source(folder), spec, tmp_path)
    assert not list(tmp_path.glob("corpora/.building-*"))
