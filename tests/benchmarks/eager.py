"""Tokens a second of Escala's trainer against a plain eager loop over the same transformers model.

The plain loop is the common one: a DataLoader, the library's own loss, default AdamW, `.item()` each step. Run as a
program, it prints one JSON line per size: [parameters, tokens/s of ours, of the plain one, ratio]. The two alternate on
one thread, and the ratio is the median of neighbours' ratios.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, Place, Row, timed

SIZES = {10_000: 300, 40_000: 150, 160_000: 60}
"""Parameters -> steps of a run: enough that most steps log nothing, as in a study."""
CONTEXT, SEQUENCES, VOCABULARY = 128, 8, 255
LEAST_PAIRS = 5


def eager(place: Place) -> list[Row]:
    rows = []
    for line in timed([sys.executable, __file__]).output.splitlines():
        size, ours, plain, ratio = json.loads(line)
        rows.append(
            Row(
                what=f"training against a plain eager loop, {size:,} parameters",
                measured=ratio,
                unit="x",
                target=1.2,
                at_least=True,
                note=f"1 thread, llama; {ours:,.0f} against {plain:,.0f} tokens/s",
            )
        )
    return rows


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from small import MemoryIO, make_cell

    from sweeps.accounting import parameters
    from sweeps.corpora import make_source, open_corpus, prepare
    from sweeps.families import FAMILIES
    from sweeps.sizes import shape_for
    from sweeps.training import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = make_source("markov", None, {"vocab_size": VOCABULARY, "tokens": 1_000_000, "seed": 3})
        corpus = open_corpus(Path(folder), prepare(source, "bytes", Path(folder)).fingerprint)
        for size, steps in SIZES.items():
            shape = shape_for(FAMILIES["llama"], size, vocab_size=corpus.info.vocab_size, context=CONTEXT)
            batch = CONTEXT * SEQUENCES
            cell = make_cell(corpus, shape=shape, batch_tokens=batch, tokens=steps * batch)
            pairs: list[tuple[float, float]] = []
            while len(pairs) < LEAST_PAIRS:
                pairs.append((train(cell, MemoryIO(cell, corpus)).tokens_per_second or 0.0, _plain(cell, corpus)))
            speeds = [statistics.median(side) for side in zip(*pairs, strict=True)]
            ratio = statistics.median(ours / plain for ours, plain in pairs)
            print(json.dumps([parameters(shape).total, *speeds, ratio]), flush=True)


def _plain(cell: Any, corpus: Any) -> float:
    """Tokens a second of the plain loop."""
    import torch

    from sweeps.families import FAMILIES, build_model

    model = build_model(FAMILIES["llama"], cell.shape, init_std=cell.init_std, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.optimizer.learning_rate)
    windows = torch.from_numpy(corpus.batch(0, 0, cell.tokens // CONTEXT, CONTEXT - 1))  # the library shifts by itself
    began = time.perf_counter()
    for batch in torch.utils.data.DataLoader(windows, batch_size=SEQUENCES, shuffle=True):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return float(cell.tokens) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
