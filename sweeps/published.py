"""Published rules: how papers say that the learning rate, the batch and the decay grow, with their own conventions.

In a study file, with what the table below asks for:

    learning_rate: {rule: step-law}
    learning_rate: {rule: bjorck, value: 0.003, at: {N: 1.0e+6, D: 2.0e+7}}
    batch_tokens: {rule: minicpm, loss: 3.2}

Every rule is a product of powers of counts, and names the counts as its paper counts: a law of non-embedding
parameters is never handed all of them. Batches are in tokens. A law is trusted only where it was fitted: outside, the
plan says how far outside (sweeps/rules.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from sweeps.errors import nearest
from sweeps.rules import Declared, Number, Positive, PowerLaw


@dataclass(frozen=True, kw_only=True)
class Published:
    """One paper's laws: for each hyperparameter that it gives, a factor and the powers of what it follows."""

    paper: str
    laws: Mapping[str, tuple[float, Mapping[str, float]]]
    """By hyperparameter. Variables: N (all parameters of one token, embeddings included), N_nonembedding, D,
    C_nonembedding (FLOPs of training without the head and the table), tokens_per_parameter (D / N), learning_rate and
    batch_tokens of the cell itself."""
    range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Where the runs behind the laws lie, of models and lengths alike; empty where that is not known here."""
    batch: str = ""
    """What its learning rate presumes of the batch (`PowerLaw.batch`)."""
    asks: tuple[str, ...] = ()
    """What the study must give: `value` and `at` of a law without a constant of its own, or `loss`."""


PUBLISHED: Mapping[str, Published] = {
    # N without embeddings; AdamW, cosine to a fixed floor of 1e-5. The range is that of the runs that the authors
    # released for dense models.
    "step-law": Published(
        paper="Li et al. 2025, arXiv 2503.04715",
        laws={
            "learning_rate": (1.79, {"N_nonembedding": -0.713, "D": 0.307}),
            "batch_tokens": (0.58, {"D": 0.571}),
        },
        range={"N_nonembedding": (2.1466e8, 1.0738e9), "D": (4e9, 1e11)},
        batch="step-law",
    ),
    # C = M D, where M counts the FLOPs of a token without embeddings and with attention over the whole context:
    # 72 depth width^2 + 12 depth width context for their shapes. Here M is counted from the cell's own shape.
    "deepseek": Published(
        paper="DeepSeek-AI 2024, arXiv 2401.02954, section 3.1",
        laws={
            "learning_rate": (0.3118, {"C_nonembedding": -0.1250}),
            "batch_tokens": (0.2920, {"C_nonembedding": 0.3271}),
        },
        range={"C_nonembedding": (1e17, 2e19)},
        batch="deepseek",
    ),
    # Only ratios of N and of D matter, so the constant, and with it what N counts, is the study's own.
    "bjorck": Published(
        paper="Bjorck et al. 2024, arXiv 2409.19913",
        laws={"learning_rate": (1.0, {"N": -0.23, "D": -0.32})},
        batch="constant",
        asks=("value", "at"),
    ),
    # The loss is the one expected at the end, in nats a token of the paper's tokenizer: a byte's loss is another.
    "minicpm": Published(
        paper="Hu et al. 2024, arXiv 2404.06395",
        laws={"batch_tokens": (1.21e9, {"loss": -6.24})},
        asks=("loss",),
    ),
    # decay = B / (rate D tau) with the AdamW timescale tau = 1.084 (D/N)^-0.527, a fraction of the run. Follows the
    # rate and the batch that the cell has, whatever gave them. Models of 111 M to 3.3 B; for which D/N the law was
    # fitted is not known here.
    "power-lines": Published(
        paper="Bergsma et al. 2025, arXiv 2505.13738",
        laws={
            "weight_decay": (
                1 / 1.084,
                {"batch_tokens": 1.0, "learning_rate": -1.0, "D": -1.0, "tokens_per_parameter": 0.527},
            )
        },
        range={"N": (1.11e8, 3.3e9)},
    ),
}


class PublishedRule(Declared):
    """A published rule as a study file names it, with what that rule asks for."""

    rule: str
    value: Positive | None = None
    """The hyperparameter at the reference point, of a rule that has no constant of its own."""
    at: dict[str, Positive] | None = None
    """The reference point: N counts all parameters, D is in tokens."""
    loss: Annotated[Number, Field(ge=0.1, le=20)] | None = None
    """The loss that is expected at the end, nats a token."""

    @model_validator(mode="before")
    @classmethod
    def _one_origin(cls, value: Any) -> Any:
        if isinstance(value, dict) and "fitted" in value:
            raise ValueError("a hyperparameter is by a published rule or fitted, not both; leave out one of the two")
        return value

    @field_validator("rule")
    @classmethod
    def _rule_is_known(cls, value: str) -> str:
        if value not in PUBLISHED:
            raise ValueError(f"allowed: {', '.join(PUBLISHED)}{nearest(value, PUBLISHED)}")
        return value

    @model_validator(mode="after")
    def _what_it_asks_for(self) -> "PublishedRule":
        asks = PUBLISHED[self.rule].asks
        given = [name for name in ("value", "at", "loss") if getattr(self, name) is not None]
        if strange := [name for name in given if name not in asks]:
            raise ValueError(f"{self.rule} takes no {' and no '.join(strange)}; its constants are published")
        if asks == ("loss",) and not given:
            raise ValueError(
                f"{self.rule} needs the loss that is expected at the end, such as {{rule: {self.rule}, loss: 3.2}}"
            )
        if "at" in asks and (set(given) != set(asks) or set(self.at or ()) != {"N", "D"}):
            raise ValueError(
                f"{self.rule} says how the rate changes, not what it is: give it at a reference point, such as "
                f"{{rule: {self.rule}, value: 0.003, at: {{N: 1.0e+6, D: 2.0e+7}}}}"
            )
        return self


def check_gives(rule: PublishedRule, hyperparameter: str) -> None:
    """Raise ValueError where a rule says nothing of this hyperparameter."""
    gives = PUBLISHED[rule.rule].laws
    if hyperparameter not in gives:
        others = [name for name, one in PUBLISHED.items() if hyperparameter in one.laws]
        mended = f"{hyperparameter} is given by {', '.join(others)}" if others else f"no rule gives {hyperparameter}"
        raise ValueError(f"{rule.rule} gives {' and '.join(gives)} only; {mended}")


def published_law(rule: PublishedRule, hyperparameter: str) -> PowerLaw:
    """The law of a hyperparameter that a published rule stands for. ValueError where it gives no such one."""
    check_gives(rule, hyperparameter)
    one = PUBLISHED[rule.rule]
    factor, power = one.laws[hyperparameter]
    if rule.loss is not None:
        factor, power = factor * rule.loss ** power["loss"], {}
    return PowerLaw(
        source=rule.rule,
        value=factor if rule.value is None else rule.value,
        power=power,
        at=rule.at or {},
        range=one.range,
        batch=one.batch if hyperparameter == "learning_rate" else "",
    )
