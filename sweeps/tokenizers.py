"""Text to tokens: raw bytes, a byte-level BPE trained on the corpus itself, or a tokenizer that is on this machine.

Every tokenizer has a separator that ends a document. It never stands for text: a document that spells a separator out
is encoded as the plain characters it is. Nothing here reaches the network.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.errors import InputError, about, nearest

BYTE_SEPARATOR = 0xFF
"""Ends a document in the bytes tokenizer; this byte occurs in no UTF-8 text."""

BPE_SEPARATOR = "<|endoftext|>"
BPE_VOCABULARY = (257, 1_000_000)
"""Smallest (256 bytes and the separator) and largest vocabulary of bpe:<vocab>."""

BPE_TRAINING_BYTES = 2**30
"""A BPE is trained on the training split's first gigabyte: merges are stable long before, and memory stays bounded."""

ENCODE_BYTES = 4 * 2**20  # text per call of the library


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer that is ready to encode."""

    identity: str
    """bpe-<vocab>-<hash> or hf-<vocab>-<hash>, with 8 hex digits of its content; file names do not enter."""
    vocab_size: int
    """Largest token id plus one, separator included."""
    separator: int
    tokenizer: Any
    """tokenizers.Tokenizer"""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators or any other special token. InputError where it cannot."""
        with _library(
            f"the tokenizer {self.identity} cannot encode this corpus",
            "Mend it (its unknown token must be in its vocabulary), or name another",
        ):
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(one.ids, dtype=np.uint32) for one in encoded]

    def gives_back(self, text: str, ids: np.ndarray) -> bool:
        """Whether a text can be read from its tokens: not where they say "unknown", or leave something out."""
        with _library(f"the tokenizer {self.identity} cannot decode what it encoded", "Mend it, or name another"):
            if self.tokenizer.decoder is None:  # the library would then put a space between any two tokens
                found = "".join(self.tokenizer.id_to_token(one) for one in ids.tolist())
            else:
                found = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        # many put a space before a text, or take one away
        return found == text or bool(found.lstrip(" ") == text.lstrip(" "))


@about("tokenizer")
def tokenizer_kind(spec: str) -> str:
    """ "bytes", "bpe" or "file". Raises InputError for a tokenizer that is none of them or out of range."""
    if spec == "bytes":
        return "bytes"
    if spec.startswith("bpe:"):
        bpe_vocabulary(spec)
        return "bpe"
    if tokenizer_file(spec).is_file():
        return "file"
    path = Path(spec).expanduser()
    if path.is_dir():
        raise InputError(
            f"the tokenizer folder {path} has no tokenizer.json. Save a fast tokenizer there "
            "(save_pretrained), or name another folder or a tokenizer.json."
        )
    raise InputError(
        f'unknown tokenizer "{spec}"{nearest(spec, ["bytes", "bpe:512", "bpe:32768"])}: neither bytes, bpe:<vocabulary '
        f"size>, nor a path to a tokenizer on this machine, where a relative one begins at {Path.cwd()} (names on the "
        "Hub are not downloaded)"
    )


def is_here(spec: str) -> bool:
    """False for the path of a tokenizer that is not on this machine."""
    return spec == "bytes" or spec.startswith("bpe:") or tokenizer_file(spec).is_file()


def may_be(spec: str, identity: str) -> bool:
    """Whether a stored corpus with this tokenizer identity can be what `spec` asks for, as far as names tell."""
    if spec == "bytes":
        return identity == "bytes" or identity.startswith("markov-")
    if spec.startswith("bpe:"):
        return identity.startswith(f"bpe-{bpe_vocabulary(spec)}-")
    return identity.startswith("hf-")


def bpe_vocabulary(spec: str) -> int:
    """The vocabulary size of "bpe:<vocab>"."""
    low, high = BPE_VOCABULARY
    number = spec.removeprefix("bpe:").replace("_", "")
    if not (number.isascii() and number.isdigit() and low <= int(number) <= high):
        raise InputError(
            f'tokenizer "{spec}": the vocabulary size must be a number from {low} (256 bytes and the separator) '
            f"to {high:,}, such as bpe:512 or bpe:32768"
        )
    return int(number)


def tokenizer_file(spec: str) -> Path:
    """Where the tokenizer.json of a local tokenizer would be."""
    path = Path(spec).expanduser()
    return path if path.is_file() else path / "tokenizer.json"


def train_bpe(documents: Iterator[bytes], vocab_size: int) -> Encoder:
    """A byte-level BPE (GPT-2's splitting rule) with the separator as token 0.

    The same documents give the same merges: ties between equally frequent pairs go by token id. Raises InputError
    where they have too few repeated pairs for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BPE_SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents, BPE_TRAINING_BYTES), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise InputError(
            f"the training text has repeated pairs for only {found} tokens, fewer than bpe:{vocab_size} asks for; "
            f"ask for bpe:{found} or less, or use a larger corpus",
            field=("tokenizer",),
        )
    model = json.loads(tokenizer.to_str())["model"]  # not the whole file: its layout may change between releases
    digest = hashlib.sha256(json.dumps([model["vocab"], model["merges"]], sort_keys=True).encode()).hexdigest()
    return _encoder(tokenizer, f"bpe-{vocab_size}-{digest[:8]}", BPE_SEPARATOR)


@about("tokenizer")
def load_tokenizer(spec: str) -> Encoder:
    """A Hugging Face tokenizer from a folder or a tokenizer.json; its end-of-text token is the separator.

    Raises InputError where the file is no tokenizer or no end-of-text token is declared beside it.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(spec)
    with _library(f"{file} cannot be read as a tokenizer", "Save it anew (save_pretrained), or name another tokenizer"):
        content = file.read_bytes()
        tokenizer = Tokenizer.from_str(content.decode())
    end = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = file.with_name(name)
        if end is None and beside.is_file():
            try:
                declared = json.loads(beside.read_bytes()).get("eos_token")
            except (ValueError, AttributeError, OSError) as error:
                raise InputError(f"{beside} cannot be read as JSON: {error}") from error
            end = declared.get("content") if isinstance(declared, dict) else declared
    if not isinstance(end, str) or tokenizer.token_to_id(end) is None:
        fault = "declares no end-of-text token" if end is None else f'does not contain its end-of-text token "{end}"'
        raise InputError(
            f"the tokenizer {file} {fault}, which Escala needs to separate documents. "
            'Set "eos_token" in the tokenizer_config.json beside it to one of its tokens.'
        )
    size = max(tokenizer.get_vocab().values()) + 1
    return _encoder(tokenizer, f"hf-{size}-{hashlib.sha256(content).hexdigest()[:8]}", end)


def encode_documents(
    encoder: Encoder, documents: Iterator[bytes], tokenizer: str
) -> Iterator[tuple[bytes, np.ndarray]]:
    """(document, its token ids and the separator), encoded in batches of about ENCODE_BYTES."""
    while True:
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document)
            if size >= ENCODE_BYTES:
                break
        if not batch:
            return
        for document, ids in zip(batch, encoder.encode([document.decode() for document in batch])):
            if (ids == encoder.separator).any():
                raise InputError(
                    f"the tokenizer {tokenizer} uses its end-of-text token inside documents, so it cannot separate "
                    "them; give it an end-of-text token of its own",
                    field=("tokenizer",),
                )
            yield document, np.append(ids, np.uint32(encoder.separator))


@contextmanager
def _library(fault: str, remedy: str) -> Iterator[None]:
    """Whatever the library raises in here is an InputError. Its own are bare Exceptions, and a panic of its Rust code
    is neither an Exception nor a class that could be imported."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{fault}: {error}. {remedy}.", field=("tokenizer",)) from error


def _texts(documents: Iterator[bytes], limit: int) -> Iterator[str]:
    for document in documents:
        yield document.decode()
        limit -= len(document)
        if limit <= 0:
            return


def _encoder(tokenizer: Any, identity: str, separator: str) -> Encoder:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # of merges, meant for training: a text would have other tokens each time
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    return Encoder(
        identity=identity,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        separator=tokenizer.token_to_id(separator),
        tokenizer=tokenizer,
    )
