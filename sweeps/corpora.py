"""A corpus: token shards under a store, built once, named by the hash of their content, and never changed after.

    corpora/<fingerprint>/meta.json             CorpusInfo, streams, format; written last
                          train-00000.bin ...   documents, each ended by the separator
                          validation-00000.bin  the validation stream, the same for every run
                          validation_ends.npy   int64: where each validation document ends (separator included)
                          tokenizer.json        unless the tokenizer is bytes
                          sources/<signature>   empty: this source, looking like this, gave this corpus
    corpora/.building-*                         a build in progress, or what a killed one left

sweeps/splits.py tells which documents validate, sweeps/order.py in which order windows are read, sweeps/builds.py how
a corpus is written. This file finds, pins and reads one. Guarded against: a source that changes under a study (the
study pins the fingerprint, and a source that gives another one is an error that says how to accept it), and damaged
shards.
"""

import hashlib
from pathlib import Path

import numpy as np

from sweeps import shards, sources, tokenizers
from sweeps.builds import FORMAT, CorpusInfo, Progress, build, read_meta
from sweeps.errors import InputError
from sweeps.order import epoch_keys, permute
from sweeps.sources import Source, make_source
from sweeps.store import CORPUS_NAME, Store

__all__ = ["Corpus", "CorpusInfo", "Source", "make_source", "open_corpus", "prepare"]


class Corpus:
    """An open corpus: training batches and validation windows. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where the folder is no corpus or a damaged one; use `open_corpus`."""
        self.info, streams = read_meta(folder)
        self._train = shards.StreamReader(folder, streams["train"])
        self._validation = shards.StreamReader(folder, streams["validation"])
        self._ends = np.load(folder / "validation_ends.npy", allow_pickle=False)

    def batch(self, data_seed: int, step: int, sequences: int, context: int) -> np.ndarray:
        """The training batch of one step: int64 (sequences, context + 1), inputs and the targets one to the right.

        A pure function of the fingerprint and the arguments. Sequence step * sequences + i is number p of one endless
        stream per data seed: epoch p // windows shows every window once, in a random order, on a grid shifted at
        random by 0 to context - 1 tokens. So batch sizes only group the stream and no horizon enters.
        """
        windows = self.info.windows(context)
        first, last = step * sequences, (step + 1) * sequences
        starts = []
        for epoch in range(first // windows, (last - 1) // windows + 1):
            low, high = max(first - epoch * windows, 0), min(last - epoch * windows, windows)
            keys = epoch_keys(self.info.fingerprint, data_seed, epoch)
            order = permute(np.arange(low, high, dtype=np.uint64), windows, keys[:-1])
            starts.append(order.astype(np.int64) * context + int(keys[-1]) % context)
        return self._train.rows(starts[0] if len(starts) == 1 else np.concatenate(starts), context + 1)

    def validation_windows(self, context: int) -> int:
        """Full windows of the validation stream, as `CorpusInfo.validation_windows` counts them."""
        return self.info.validation_windows(context)

    def validation_batch(self, start: int, count: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Validation windows start .. start + count - 1.

        Returns tokens, int64 (count, context + 1), and the document that each predicted token belongs to, int64
        (count, context), for errors clustered by document; a separator belongs to the document that it ends.
        Raises IndexError for windows that do not exist.
        """
        if start < 0 or count < 0 or start + count > self.validation_windows(context):
            raise IndexError(f"windows {start}..{start + count} of {self.validation_windows(context)}")
        starts = np.arange(start, start + count) * context
        targets = starts[:, None] + np.arange(1, context + 1)
        return self._validation.rows(starts, context + 1), np.searchsorted(self._ends, targets, side="right")


# -- finding and pinning -------------------------------------------------------------------------------------------


def open_corpus(root: Path, fingerprint: str) -> Corpus:
    """Open a corpus of the store at `root`. Raises InputError where it is missing or damaged."""
    folder = Store(Path(root)).corpus(fingerprint)
    if not (folder / "meta.json").is_file():
        raise InputError(f"no corpus {fingerprint} in the store {root}; plan or run the study where its source is")
    return Corpus(folder)


def prepare(
    source: Source,
    tokenizer: str,
    root: Path,
    *,
    accept: bool = False,
    pinned: str | None = None,
    progress: Progress | None = None,
) -> CorpusInfo:
    """The corpus that a source and a tokenizer give: found in the store at `root`, or built there.

    `tokenizer` is bytes, bpe:<vocab> or the path of a local Hugging Face tokenizer; a markov source draws tokens
    itself and takes bytes. `pinned` is the fingerprint that the study was begun with. Where the source is not on this
    machine, the pinned shards of the store are the corpus. Where it is and now gives something else, that is an
    InputError, unless `accept`. `progress(phase, fraction)` is called at most ten times a second.

    Raises InputError for anything wrong with source, tokenizer, store or pin.
    """
    corpora = Path(root) / "corpora"
    here = sources.is_here(source) and tokenizers.is_here(tokenizer)
    kept = Store(Path(root)).corpus(pinned) if pinned else None
    if kept and not here and (kept / "meta.json").is_file():
        return _stored(kept, tokenizer)
    kind = tokenizers.tokenizer_kind(tokenizer)
    if source.kind == "markov" and kind != "bytes":
        raise InputError(
            f'a markov source draws tokens itself: its tokenizer must be bytes, not "{tokenizer}"', field=("tokenizer",)
        )

    # 1. Known already? A signature file says which fingerprint a source that looks like this one gave.
    signature = _signature(source, tokenizer, kind)
    names = (path.parent.parent.name for path in sorted(corpora.glob(f"*/sources/{signature}")))
    known = [name for name in names if CORPUS_NAME.fullmatch(name)]
    # 2. If not, build it: only the tokens tell the fingerprint.
    if pinned in known:
        fingerprint = pinned
    else:
        fingerprint = known[0] if known else build(corpora, source, tokenizer, signature, progress)
    info, _ = read_meta(corpora / fingerprint)
    # 3. Is it the one the study was begun with?
    if pinned and info.fingerprint != pinned and not accept:
        raise InputError(
            f"this study is pinned to the corpus {pinned}, but {sources.describe(source)} with the tokenizer "
            f"{tokenizer} now gives {info.fingerprint}: losses on different corpora are not comparable. To go on with "
            f"the new one, pass --accept-corpus or set fingerprint: {info.fingerprint} under corpus: in the study "
            "file; to keep the old one, restore its source.",
            field=("corpus", "path"),
        )
    return info


def _stored(folder: Path, tokenizer: str) -> CorpusInfo:
    """The pinned corpus of a source that is not on this machine."""
    info, _ = read_meta(folder)
    if not tokenizers.may_be(tokenizer, info.tokenizer):
        raise InputError(
            f'this study asks for the tokenizer "{tokenizer}", but the corpus {info.fingerprint} that it is pinned to '
            f"has {info.tokenizer}, and its source is not on this machine to be tokenised again",
            field=("tokenizer",),
        )
    return info


def _signature(source: Source, tokenizer: str, kind: str) -> str:
    content = tokenizer
    if kind == "file":
        file = tokenizers.tokenizer_file(tokenizer)
        beside = [file, file.with_name("tokenizer_config.json"), file.with_name("special_tokens_map.json")]
        content = "".join(hashlib.sha256(one.read_bytes()).hexdigest() for one in beside if one.is_file())
    return hashlib.sha256(f"{FORMAT}:{sources.signature(source)}:{content}".encode()).hexdigest()[:16]
