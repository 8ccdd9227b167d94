"""Plans by hand: a corpus that need not be built, and studies of a few cells on it, for tests of what is planned."""

from typing import Any

from sweeps.corpora import CorpusInfo
from sweeps.grids import Plan, plan_study
from sweeps.planned import PlannedCell
from sweeps.study import Study

CONTEXT = 64
POINT = {"size": 2e4, "tokens": 64_000}


def corpus(train_tokens: int = 10_000_000, validation_tokens: int = 500_000, vocab_size: int = 256) -> CorpusInfo:
    return CorpusInfo(
        fingerprint="0123456789abcdef",
        name="by hand",
        tokenizer="bytes",
        vocab_size=vocab_size,
        separator=255,
        train_tokens=train_tokens,
        train_documents=100,
        validation_tokens=validation_tokens,
        validation_documents=10,
        validation_bytes=validation_tokens - 10,
        duplicate_documents=0,
        entropy_rate=None,
        description="made for a test",
    )


def study(grid: dict[str, Any], **fields: Any) -> Study:
    plain = {"name": "test", "families": ["llama"], "context": CONTEXT, "training": {"batch_tokens": 640}}
    return Study.model_validate({**plain, "grid": grid, **fields})


def points(*given: dict[str, Any], **fields: Any) -> Study:
    return study({"type": "points", "points": list(given)}, **fields)


def planned(declared: Study, info: CorpusInfo | None = None) -> Plan:
    return plan_study(declared, info or corpus())


def only(declared: Study) -> PlannedCell:
    (one,) = planned(declared).cells
    return one
