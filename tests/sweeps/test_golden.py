"""Golden losses guard NUMERICS_VERSION: who moves a number must say so, or the cells of old stores would mix with new.

If a test here fails after a change that is meant to move losses, raise NUMERICS_VERSION in sweeps/cell.py and record
the new values. If it fails after any other change, the change is wrong. Other processors round differently, so the
bound is 2e-5; equality to the bit on one machine is tested in test_training.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from small import MemoryIO

from sweeps.cell import NUMERICS_VERSION, Cell, Optimizer, Schedule
from sweeps.corpora import make_source, open_corpus, prepare
from sweeps.families import FAMILIES, resolve_options
from sweeps.sizes import shape_for
from sweeps.training import train

WORDS = ("the law of large models is a line on paper until someone pays for the tokens that bend it").split()  # noqa: SIM905

# The corpus that the values hold for. It is part of every cell's identity, so another split needs no new version.
FINGERPRINT = "8756076be1090d1b"
# Their shapes, as the size rule once gave them for 40,000 parameters: another rule needs no new version either.
SHAPES = {
    "gpt2": {"width": 30, "depth": 3, "heads": 3, "kv_heads": 3, "head_dim": 10, "mlp_width": 104},
    "llama": {"width": 30, "depth": 3, "heads": 3, "kv_heads": 3, "head_dim": 10, "mlp_width": 56},
    "mixtral": {"width": 24, "depth": 2, "heads": 3, "kv_heads": 1, "head_dim": 8, "mlp_width": 80},
}
# NUMERICS_VERSION -> family -> (training loss after 12 steps, final validation loss)
GOLDEN = {
    1: {
        "gpt2": (4.030627727508545, 4.009329186480036),
        "llama": (4.174819469451904, 4.17586291313407),
        "mixtral": (4.415628910064697, 4.424085876628344),
    }
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_losses_do_not_move_without_a_new_numerics_version(family: str, tmp_path: Path) -> None:
    for index in range(40):
        text = " ".join(WORDS[(index * 7 + i * i) % len(WORDS)] for i in range(120 + index))
        (tmp_path / f"{index:02}.txt").write_text(text)
    root = tmp_path / "store"
    source = make_source("folder", str(tmp_path), {"glob": "*.txt"})
    corpus = open_corpus(root, prepare(source, "bytes", root).fingerprint)
    assert corpus.info.fingerprint == FINGERPRINT, "another corpus: record its losses, the version stays"
    cell = Cell(
        family=family,
        family_version="1",
        options=tuple(sorted(resolve_options(FAMILIES[family]).items())),
        shape=replace(shape_for(FAMILIES[family], 40_000, vocab_size=256, context=32), **SHAPES[family]),
        init_std=0.05,
        corpus=corpus.info.fingerprint,
        tokenizer="bytes",
        tokens=12 * 256,
        batch_tokens=256,
        optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8, clip_norm=1.0),
        schedule=Schedule(name="wsd", warmup_tokens=512, final_fraction=0.0, cooldown_fraction=0.2),
        precision="float32",
        seed=3,
        data_seed=4,
    )
    io = MemoryIO(cell, corpus)
    outcome = train(cell, io)
    assert (io.rows[cell.tokens]["train_loss"], outcome.val_loss_final) == pytest.approx(
        GOLDEN[NUMERICS_VERSION][family], rel=2e-5
    )
