"""What a stranger's study, corpus, dataset, tokenizer or checkpoint cannot do: run code, reach what lies outside.

Every hostile file here is real; where it would run code, a test first shows that it does when it is opened carelessly.
"""

import gzip
import hashlib
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import make_cell, put

from sweeps import redaction
from sweeps.attempt import run_attempt
from sweeps.checkpoints import load, save
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.errors import InputError
from sweeps.families import find_family
from sweeps.paths import inside
from sweeps.records import encode_row
from sweeps.redaction import redact
from sweeps.sources import documents, source_files
from sweeps.store import Store, attempt_epochs
from sweeps.studyfile import load_study
from sweeps.tokenizers import load_tokenizer
from sweeps.usercode import trainer_identity

STUDY = """
name: tiny
families: [llama]
grid: {type: ladder, sizes: [1e5], tokens_per_parameter: [20]}
"""


LONG = "1" * 401
"""A whole number that is no float."""


class Touch:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def study(folder: Path, more: str, base: str = STUDY) -> Path:
    (folder / "study.yaml").write_text(base + more)
    return folder / "study.yaml"


# --- study files ---------------------------------------------------------------------------------------------------


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'lol'}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (BOMB, "anchors and aliases"),
        ("question: !!python/object/apply:os.system ['touch here']\n", "tags are not allowed"),
        (f"context: {'1' * 5000}\n", "cannot be read"),
        (f"context: {':'.join(['59'] * 20_000)}\n", "cannot be read"),
        ("question: 2001-13-99\n", "cannot be read"),
        (f"context: 1{':59' * 20_000}.5\n", "cannot be read"),
        ("? [1, 2]\n: 3\n", "a key must be a word"),
        (f"vary: {'[' * 50_000}{']' * 50_000}\n", "nested too deeply"),
        ("vary: {learning_rate: {log: {from: 1e-5, to: 1, points: 1000000000}}}\n", "points"),
    ],
)
def test_no_study_file_executes_explodes_or_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told):
        load_study(study(tmp_path, more))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("search: {space: {learning_rate: {linear: [.1, .2], step: 1e-320}}}", "learning_rate: .* step 1e-320 is too"),
        (f"search: {{space: {{batch_tokens: {{int: [1, {LONG}]}}}}}}", r"batch_tokens\.int\[1\]: .* below 2\^63"),
        (f"validation_tokens: {LONG}", r"validation_tokens: .* below 2\^63"),
        (f"families: {{llama: {{heads_per_kv: {LONG}}}}}", r"heads_per_kv: .* below 2\^63"),
        (f"grid: {{type: isoflop, budgets: [1e15], stride: {LONG}}}", r"grid\.stride: .* below 2\^63"),
        (f"grid: {{type: shapes, widths: [32], depths: [{LONG}], head_dim: 8, tokens: 1e6}}", r"depths\[0\]: .* below"),
        ("grid: {type: isoflop, budgets: {from: 1e-300, to: 1e300, points: 2}}", r"grid\.budgets: .* too far"),
        ("grid: {type: isoflop, budgets: {from: 1e300, to: 1e-300, points: 2}}", r"grid\.budgets: .* too far"),
    ],
)
def test_a_number_too_large_or_small_to_count_with_is_told_with_its_line(tmp_path: Path, more: str, told: str) -> None:
    lines = {line.partition(":")[0]: line for line in [*STUDY.split("\n"), more]}
    with pytest.raises(InputError, match=told):
        load_study(study(tmp_path, "\n".join(lines.values()), ""))


@pytest.mark.parametrize(
    "grid",
    [
        "{type: ladder, sizes: {from: 1e5, to: 1e9, points: 1000000000}, tokens_per_parameter: [20]}",
        "{type: isoflop, budgets: {from: 1e15, to: 1e18, points: 1000000000}}",
        "{type: isoflop, budgets: [1e15], sizes: 1000000000}",
        "{type: isoflop, budgets: [1e15], replicates: {budgets: 1, seeds: 1000000000}}",
    ],
)
def test_a_short_study_cannot_ask_for_more_cells_than_there_is_memory(tmp_path: Path, grid: str) -> None:
    with pytest.raises(InputError, match="less than or equal to 10000"):
        load_study(study(tmp_path, f"grid: {grid}\n", "name: tiny\nfamilies: [llama]\n"))


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "..", ".hidden", "a\nb", "a\x1b[2J", ""])
def test_a_name_that_is_a_path_is_refused_in_studies_and_where_it_would_become_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        load_study(study(tmp_path, "", STUDY.replace("name: tiny", f"name: {json.dumps(name)}")))
    with pytest.raises(InputError):
        load_study(study(tmp_path, f"training: {{learning_rate: {{fitted: {json.dumps(name)}}}}}\n"))
    for place in (Store(tmp_path).cell, Store(tmp_path).study):
        with pytest.raises(InputError, match="cannot be a"):
            place(name)


@pytest.mark.parametrize("where", ["../evil.py", "{elsewhere}/evil.py", "linked.py"])
def test_code_is_run_from_beside_the_study_alone_and_only_where_it_is_allowed(tmp_path: Path, where: str) -> None:
    (beside := tmp_path / "study").mkdir()
    touched = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(f"open({str(touched)!r}, 'w')\ndef family(): pass\n")
    (beside / "linked.py").symlink_to(tmp_path / "evil.py")
    declared = f"{where.format(elsewhere=tmp_path)}:family"
    for what in (
        lambda: find_family(declared, allow_code=True, base_dir=beside),
        lambda: trainer_identity(declared, beside),
    ):
        with pytest.raises(InputError, match="leads out of"):
            what()
    (beside / "own.py").write_text((tmp_path / "evil.py").read_text())
    with pytest.raises(InputError, match="--allow-code"):
        find_family("own.py:family", allow_code=False, base_dir=beside)
    assert not touched.exists()
    with pytest.raises(InputError, match="must return"):  # and with it, it does run
        find_family("own.py:family", allow_code=True, base_dir=beside)
    assert touched.exists()


def test_a_path_is_judged_after_its_links(tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    (folder / "here").symlink_to(folder / "there")
    (folder / "round").symlink_to(folder / "round")
    assert inside(folder, "new/file", "it") == folder / "new/file"
    assert inside(folder, "here", "it") == folder / "here"
    for path in ("..", "../in2", "/etc/passwd", "a/../../b", "round", "a\0b"):
        with pytest.raises(InputError, match=r"^it: "):
            inside(folder, path, "it")


# --- corpora, datasets, tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_a_link_in_a_corpus_folder_does_not_lead_to_files_outside(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text('{"text": "a private key"}\n')
    (folder := tmp_path / "corpus").mkdir()
    (folder / "a.jsonl").write_text('{"text": "harmless"}\n')
    (folder / "same.jsonl").symlink_to(folder / "a.jsonl")
    source = make_source(kind, str(folder))
    assert len(source_files(source)) == 2
    (folder / "b.jsonl").symlink_to(secret)
    with pytest.raises(InputError, match=r"b\.jsonl leads out of"):
        list(documents(source))
    for pattern in ("../*", "/etc/*"):
        with pytest.raises(InputError):
            list(documents(make_source(kind, str(folder), {"glob": pattern})))


@pytest.mark.parametrize("named", ["{outside}/secret.jsonl", "../secret.jsonl", "linked.jsonl"])
def test_the_card_of_a_dataset_folder_names_no_files_outside(tmp_path: Path, named: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "secret.jsonl").write_text('{"text": "a private key"}\n')
    (folder := tmp_path / "set").mkdir()
    (folder / "own.jsonl").write_text('{"text": "harmless"}\n')
    (folder / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    card = "---\nconfigs:\n- config_name: default\n  data_files: '{}'\n---\n"
    (folder / "README.md").write_text(card.format("own.jsonl"))
    assert [text for text, _ in documents(make_source("hf", str(folder)))] == [b"harmless"]
    (folder / "README.md").write_text(card.format(named.format(outside=tmp_path)))
    with pytest.raises(InputError):
        list(documents(make_source("hf", str(folder))))


def test_a_dataset_folder_with_a_loading_script_runs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (folder := tmp_path / "set").mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    (folder / "own.jsonl").write_text('{"text": "harmless"}\n')
    for path in (folder, folder / "set.py"):
        with pytest.raises(InputError, match="scripts are no longer supported"):
            list(documents(make_source("hf", str(path))))
    assert not (tmp_path / "touched").exists()


def test_a_tokenizer_folder_with_code_gives_its_tokenizer_and_runs_nothing(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    touched = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(
        f"open({str(touched)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    config = {"eos_token": "<end>", "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).vocab_size == 3
    assert not touched.exists()
    AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert touched.exists(), "the folder would have run code"


def test_the_header_of_a_stored_corpus_names_neither_files_outside_nor_objects(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 200)
    info = prepare(make_source("folder", str(tmp_path / "text")), "bytes", tmp_path / "store")
    folder = tmp_path / "store" / "corpora" / info.fingerprint
    meta = (folder / "meta.json").read_text()
    outside = tmp_path / "x-00000.bin"
    outside.write_bytes((folder / "train-00000.bin").read_bytes())
    for wrong in (
        meta.replace('"<u1"', '"O"'),
        meta.replace('"<u1"', '"<f8"'),
        meta.replace('"train"', f'"{tmp_path}/x"'),
        "[" * 100_000,
    ):
        assert wrong != meta
        (folder / "meta.json").write_text(wrong)
        with pytest.raises(InputError, match="damaged"):
            open_corpus(tmp_path / "store", info.fingerprint)
    (folder / "meta.json").write_text(meta)
    ends = (folder / "validation_ends.npy").read_bytes()
    touched = tmp_path / "touched"
    with (folder / "validation_ends.npy").open("wb") as stream:
        np.save(stream, np.array([Touch(touched)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="damaged"):
        open_corpus(tmp_path / "store", info.fingerprint)
    assert not touched.exists()
    huge = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (10**9,), }"
    for content in (ends[:-1], huge, b"", gzip.compress(ends)):
        (folder / "validation_ends.npy").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            open_corpus(tmp_path / "store", info.fingerprint)


@pytest.mark.parametrize(
    "name", ["../../elsewhere", "/etc/passwd", "..", "0123456789ABCDEF", "0123456789abcdef0", "a\n"]
)
def test_a_fingerprint_that_is_a_path_opens_no_corpus_outside_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"corpus\.fingerprint: .* 16 hex digits"):
        load_study(study(tmp_path, f"corpus: {{fingerprint: {json.dumps(name)}}}\n"))
    with pytest.raises(InputError, match="cannot be a corpus"):
        open_corpus(tmp_path / "store", name)
    gone = make_source("folder", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="cannot be a corpus"):
        prepare(gone, "bytes", tmp_path / "store", pinned=name)


def test_a_corpus_outside_the_store_is_not_opened_by_its_way_there_nor_one_named_by_a_path(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 200)
    info = prepare(make_source("folder", str(tmp_path / "text")), "bytes", tmp_path / "other")
    (tmp_path / "store" / "corpora").mkdir(parents=True)
    way = f"../../other/corpora/{info.fingerprint}"
    assert (tmp_path / "store" / "corpora" / way / "meta.json").is_file()
    with pytest.raises(InputError, match="cannot be a corpus"):
        open_corpus(tmp_path / "store", way)
    meta = tmp_path / "other" / "corpora" / info.fingerprint / "meta.json"
    meta.write_text(meta.read_text().replace(info.fingerprint, way))
    with pytest.raises(InputError, match="damaged"):
        open_corpus(tmp_path / "other", info.fingerprint)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_a_pickle_is_no_checkpoint_and_runs_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 10, {"x": torch.zeros(3)})
    assert load(path) is not None
    touched = tmp_path / "touched"
    torch.save({"x": Touch(touched)}, path / "state.safetensors")
    digest = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    record = {"format": 1, "tokens": 10, "time": time.time(), "permanent": False, "log_bytes": 0}
    (path / "state.json").write_bytes(encode_row({**record, "sha256": digest, "state": {"x": {"$tensor": "x"}}}))
    assert load(path) is None
    assert not touched.exists()
    torch.load(io.BytesIO((path / "state.safetensors").read_bytes()), weights_only=False)
    assert touched.exists(), "the file would have run code"
    (path / "state.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "again")))
    assert load(path) is None
    assert not (tmp_path / "again").exists()


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("cannot reach https://ada:lovelace1815@mlflow.example/api", "lovelace1815"),
        ("postgresql://mlflow:p@ss:w@host:5432/db", "p@ss"),
        ("https://glpat_0123456789abcdefghij@git.example/x", "0123456789"),
        ("headers {'Authorization': 'Bearer abc.def.ghi'}", "abc.def"),
        ("authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ('{"Authorization":"sesame12345"}', "sesame"),
        ("GET /file?X-Amz-Signature=0123abcd&part=1", "0123abcd"),
        ("key AKIAIOSFODNN7EXAMPLE here", "AKIAIOSFODNN7EXAMPLE"),
        ("aws_secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
        ("token hf_abcdefghijklmnopqrstuvwxyz", "hf_abcdef"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAK\n-----END RSA PRIVATE KEY-----", "MIIEpAIBAAK"),
    ],
)
def test_secrets_of_a_known_form_are_hidden(text: str, gone: str) -> None:
    assert gone not in redact(text)
    assert redaction.HIDDEN in redact(text)


@pytest.mark.parametrize(
    "name", ["RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY"]
)
def test_the_secrets_of_the_environment_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "open sesame")
    monkeypatch.setenv("OTHER_TOKEN", "open sesame street")  # holds the first
    assert redact("it was open sesame street, then open sesame.") == "it was ***, then ***."
    monkeypatch.setenv(name, "short")
    assert redact("a short word") == "a short word"


@pytest.mark.parametrize(
    "text",
    [
        "val_loss 3.14 at 1,000 tokens",
        "sqlite:////home/a:b/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1",
        "ssh://git@host/repository",
        "12:30 ada@example.org",
        "the tokenizer's key=value pairs",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_no_secret_of_a_users_own_trainer_gets_into_the_store(
    corpus: Corpus, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    (tmp_path / "fails.py").write_text(
        "import os\ndef train(cell, io):\n    word = os.environ['MLFLOW_TRACKING_PASSWORD']\n"
        "    key = os.environ['WANDB_API_KEY']\n"
        "    raise ConnectionError(f'https://ada:lovelace1815@host refused {key}, {word}')\n"
    )
    (tmp_path / "diverges.py").write_text(
        "import os\nfrom sweeps.trainer import Outcome\ndef train(cell, io):\n"
        "    return Outcome(state='diverged', reason='at ' + os.environ['WANDB_API_KEY'])\n"
    )
    for file in ("fails.py", "diverges.py"):
        cell = make_cell(corpus, 30, trainer=trainer_identity(f"{file}:train", tmp_path))
        ended = run_attempt(store, put(store, cell), study="s", base_dir=tmp_path)
        assert "***" in (ended.reason or "")
        assert attempt_epochs(store, cell.id) == [0]
        for path in (one for one in store.cell(cell.id).rglob("*") if one.is_file()):
            for secret in (b"0123456789abcdef0123", b"lovelace1815", b"correct horse"):
                assert secret not in path.read_bytes(), path
