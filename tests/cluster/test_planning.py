"""Planning a study file: faults that only a look at the machine can tell have their place in the file too."""

from pathlib import Path

import pytest

from cluster.planning import read_study
from sweeps.errors import InputError
from sweeps.store import open_store

STUDY = """
name: s
corpus:
  source: folder
  path: texts
tokenizer: bytes
families: [llama]
grid: {type: ladder, sizes: [20000], tokens_per_parameter: [2]}
"""


def said(folder: Path, text: str) -> str:
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_study(str(path), folder / "store", False, False)
    return str(caught.value)


def test_a_corpus_or_a_tokenizer_that_is_not_here_is_named_with_its_line(tmp_path: Path) -> None:
    file, texts = tmp_path / "s.yaml", tmp_path / "texts"
    assert said(tmp_path, STUDY) == f'{file}:5: the corpus path {texts} does not exist (source "folder")'
    texts.mkdir()
    assert said(tmp_path, STUDY).startswith(f"{file}:5: the corpus folder {texts} has no files")
    (texts / "a.txt").write_bytes(b"\xff\xfe")
    assert said(tmp_path, STUDY).startswith(f"{file}:5: {texts}/a.txt is not UTF-8 text")
    unknown = STUDY.replace("bytes", "gpt9")
    told = said(tmp_path, unknown)
    assert told.startswith(f'{file}:6: unknown tokenizer "gpt9"')
    assert f"where a relative one begins at {Path.cwd()}" in told
    (tmp_path / "tok").mkdir()
    named = STUDY.replace("bytes", str(tmp_path / "tok"))
    assert said(tmp_path, named).startswith(f"{file}:6: the tokenizer folder")
    (texts / "a.txt").unlink()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number}\n", encoding="utf-8")
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    assert said(tmp_path, named).startswith(f"{file}:6: {tmp_path}/tok/tokenizer.json cannot be read as a tokenizer")


def test_a_context_longer_than_the_corpus_is_named_with_its_line(tmp_path: Path) -> None:
    corpus = "corpus: {source: markov, options: {vocab_size: 16, tokens: 20000}}"
    text = f"{STUDY[: STUDY.index('corpus')]}{corpus}{STUDY[STUDY.index('texts') + 5 :]}context: 100000\n"
    assert said(tmp_path, text).startswith(f"{tmp_path / 's.yaml'}:7: a context of 100,000 tokens does not fit")


def test_what_is_wrong_with_the_store_has_no_line_of_the_study(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}\n" * 400, encoding="utf-8")
    store = open_store(tmp_path / "store")
    (store.root / "corpora").write_text("", encoding="utf-8")
    for text in (STUDY, STUDY.replace("path: texts", "path: .")):  # of which the store is a folder
        told = said(tmp_path, text)
        assert told.startswith("cannot write the corpus to"), told
