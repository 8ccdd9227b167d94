"""Which documents train and which validate. A function of their content alone, counted before any tokenizer.

1. Documents longer than DOCUMENT_BYTES are cut. Exact duplicates are kept once. A corpus of fewer than FEW_DOCUMENTS is
   then cut finer, so that one big file, or many copies of it, can be split as well.
2. A document's SHA-256 decides its side: below VALIDATION_SHARE it is for validation, smallest hashes first while the
   validation text stays within VALIDATION_BYTES; the two smallest always are. A document on the validation side gives
   its first VALIDATION_DOCUMENT_BYTES and the rest is used nowhere, so that many documents share the weight evenly
   and errors clustered by document are small. To tell neighbouring sizes apart to .1% of the loss takes about 300
   documents (the report shows the error measured), so a corpus of a few hundred gives nearly half of them; one of
   many megabytes gives VALIDATION_BYTES, a small part.
3. The split is counted in bytes, before any tokenizer: a BPE learns from the training side only, and all tokenizers
   are evaluated on the very same text, which makes bits per byte comparable across them. Of one whose tokens do not
   give that text back, there are none (sweeps/builds.py).
"""

import hashlib
import heapq
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from sweeps import markov, sources
from sweeps.sources import Source

VALIDATION_SHARE = 0.45
VALIDATION_BYTES = 2**21
VALIDATION_DOCUMENT_BYTES = 10 * 1024
FEW_DOCUMENTS = 32

Progress = Callable[[str, float], None]


def split(documents: Iterable[tuple[int, Any, Any]], train: Callable[[Any], None]) -> list[Any]:
    """Send training documents to `train`; return what is kept of the validation documents, smallest hash first.

    `documents` gives (64-bit hash, document, its part for validation). Which documents are chosen depends on the set
    alone, not on its order: those of the smallest hashes, two at least, then on while the hash is below the share and
    the text (separators included) within the cap. They are held in a heap and pushed out by smaller ones.
    """
    heap: list[tuple[int, int, Any, Any]] = []
    total, ceiling = 0, 2**64
    for serial, (digest, document, part) in enumerate(documents):
        if digest >= ceiling:
            train(document)
            continue
        heapq.heappush(heap, (-digest, serial, document, part))
        total += len(part) + 1
        while len(heap) > 2 and (-heap[0][0] >= VALIDATION_SHARE * 2**64 or total > VALIDATION_BYTES):
            largest, _, document, part = heapq.heappop(heap)
            ceiling = -largest
            total -= len(part) + 1
            train(document)
    return [part for *_, part in sorted(heap, reverse=True)]


def text_documents(source: Source, counts: dict[str, int], progress: Progress) -> Iterator[tuple[int, bytes, bytes]]:
    """Distinct documents for `split`. Holds a hash of each document seen: about 100 bytes per document."""
    stream = _distinct(sources.documents(source), counts, progress)
    head = list(itertools.islice(stream, FEW_DOCUMENTS))
    if len(head) < FEW_DOCUMENTS:  # at most 8 MB in all: cut finer
        size = max(1024, min(16 * 1024, sum(len(document) for _, document, _ in head) // 64))
        cut = (
            (piece, fraction)
            for _, document, fraction in head
            for piece in sources.pieces(io.BytesIO(document), size)
            if piece.strip()
        )
        head, stream = [], _distinct(cut, counts, progress)
    for digest, document, _ in itertools.chain(head, stream):
        yield digest, document, next(sources.pieces(io.BytesIO(document), VALIDATION_DOCUMENT_BYTES))


def _distinct(
    documents: Iterable[tuple[bytes, float]], counts: dict[str, int], progress: Progress
) -> Iterator[tuple[int, bytes, float]]:
    """Documents with their hashes, each once."""
    seen: set[int] = set()
    for document, fraction in documents:
        progress("read", fraction)
        digest = int.from_bytes(hashlib.sha256(document).digest()[:8], "big")
        if digest in seen:
            counts["duplicates"] += 1
            continue
        seen.add(digest)
        yield digest, document, fraction


def markov_documents(
    source: Source, chain: markov.Chain, progress: Progress
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Drawn documents for `split`, hashed by their number: to drop repeats or cut ends would bias the entropy."""
    for number, (document, fraction) in enumerate(markov.draw_documents(source, chain)):
        progress("read", fraction)
        digest = hashlib.sha256(f"{source.seed}:{number}".encode()).digest()
        yield int.from_bytes(digest[:8], "big"), document, document
