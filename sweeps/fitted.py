"""Fitted rules: a hyperparameter by the law that the analysis fitted to the runs of another study in the same store.

    learning_rate: {fitted: lr-sensitivity}

`escala sensitivity` writes the laws of a study's optima into its fits folder. A law holds for the family, the
parametrisation and the text that it was fitted on, and for no other: everything else is refused here, with what there
is. A study keeps the fit that it was first planned with (cluster/planning.py), so that a later fit of the source does
not silently change its cells.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import field_validator

from sweeps.errors import InputError, nearest
from sweeps.records import Json, read_json
from sweeps.rules import Declared, PowerLaw
from sweeps.store import STUDY_NAME, Store, study_names

GIVES = ("learning_rate", "batch_tokens", "weight_decay")
"""The hyperparameters of which laws are fitted."""
_HELD = ("batch_tokens", "schedule", "optimizer")


class FittedRule(Declared):
    """The law that was fitted to the runs of a study, by its name."""

    fitted: str

    @field_validator("fitted")
    @classmethod
    def _name_of_a_study(cls, value: str) -> str:
        if not STUDY_NAME.fullmatch(value):
            raise ValueError("the name of a study in the store: letters, digits, dot, dash and underscore only")
        return value


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The laws of the optima of one study, as its fits folder has them."""

    study: str
    corpus: str | None
    """Fingerprint; None where the study's runs are of several, or were imported and do not tell theirs."""
    tokenizer: str | None
    context: int | None
    """Tokens a sequence; None where the study had several."""
    written: str
    laws: tuple[Mapping[str, Any], ...]
    """One a hyperparameter, family, parametrisation and setting that was crossed: {"hyperparameter", "family",
    "parametrisation", "refused", "value", "at", "powers", "range", "recipe", "verdicts", ...}."""

    def to_json(self) -> Json:
        return asdict(self) | {"laws": [dict(law) for law in self.laws]}


def fit_from_json(record: Mapping[str, Any]) -> Fit:
    """The fit that `Fit.to_json` described. ValueError, KeyError, TypeError or AttributeError where it is none."""
    # runs whose table does not say are of the standard parametrisation
    laws = tuple(law | {"parametrisation": law["parametrisation"] or "standard"} for law in record["laws"])
    for law in laws:
        _ = law["hyperparameter"], law["family"], (law.get("recipe") or {}).items()
        if law["refused"]:
            _ = _reason(law)
        else:
            _ = float(law["value"]), [(float(power), float(law["at"][name])) for name, power in law["powers"].items()]
            _ = [(float(low), float(high)) for low, high in law["range"].values()], _intervals(law)
    context = record.get("context")
    return Fit(
        study=record["study"],
        corpus=record["corpus"],
        tokenizer=record["tokenizer"],
        context=int(context) if context else None,
        written=str(record.get("written", "")),
        laws=laws,
    )


def read_fit(store: Store, study: str) -> Fit:
    """The newest fit of a study's optima. InputError where the store has no such study, or it has no such fit."""
    known = study_names(store)
    path = store.study(study) / "fits" / "optimum.json"
    if study not in known:
        raise InputError(
            f"fitted: {study}: the store {store.root} has no such study{nearest(study, known)}; it has: "
            f"{', '.join(known) or 'none'}. Run that study first, in this store, then `escala sensitivity {study}`."
        )
    try:
        return fit_from_json({**read_json(path), "study": study})
    except FileNotFoundError:
        raise InputError(
            f"fitted: {study}: no law has been fitted to its runs yet. `escala sensitivity {study}` fits one."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"fitted: {study}: {path} is no fit of optima. `escala sensitivity {study}` writes it anew."
        ) from None


def fitted_law(
    fit: Fit, hyperparameter: str, *, family: str, parametrisation: str, corpus: str, recipe: Mapping[str, Any]
) -> PowerLaw:
    """The law of a hyperparameter in a fit, for cells of this family, parametrisation and corpus (a fingerprint); the
    recipe tells apart the laws of settings that were crossed.

    InputError where the fit has none or refuses it: the message says what it has, or why.
    """
    of = f"{hyperparameter}: the fit of {fit.study}"
    if fit.corpus != corpus:
        text = f"corpus {fit.corpus} ({fit.tokenizer})" if fit.corpus else "several corpora, or of none that it names"
        raise InputError(
            f"{of} is of {text}, and this study trains on {corpus}: the best {hyperparameter} on one text need not be "
            "that on another. Let both studies name one corpus and tokenizer."
        )
    there = [law for law in fit.laws if law["hyperparameter"] == hyperparameter]
    matching = [law for law in there if (law["family"], law["parametrisation"]) == (family, parametrisation)]
    if not matching:
        named = [f"{law['family']} in {law['parametrisation']} parametrisation" for law in there]
        others = ", ".join(dict.fromkeys(law["hyperparameter"] for law in fit.laws)) or "nothing"
        has = f"it has that of {' and '.join(named)}" if there else f"it has laws of {others}"
        raise InputError(
            f"{of} has no law for {family} in {parametrisation} parametrisation: {has}. Vary {hyperparameter} for it "
            f"in {fit.study}, or give a number or another rule."
        )
    law = _of_recipe(of, matching, recipe)
    if law["refused"]:
        raise InputError(f"{of} is refused for {family}: {_reason(law)}. Mend the runs of {fit.study}, then fit again.")
    source = f"the fit of {fit.study}"
    there_held = law.get("recipe") or {}
    held = {name: there_held[name] for name in _HELD if isinstance(there_held.get(name), int | float | str)}
    follows_batch = "batch_tokens" in held or "batch_tokens" in law["powers"]
    joint = hyperparameter == "learning_rate" and not follows_batch and _gives_batch(fit, law)
    return PowerLaw(
        source=source,
        value=float(law["value"]),
        power={name: float(power) for name, power in law["powers"].items()},
        at={name: float(law["at"][name]) for name in law["powers"]},
        range={name: (float(low), float(high)) for name, (low, high) in law["range"].items()},
        intervals=_intervals(law),
        batch=source if joint else "",
        held=held | ({"context": fit.context} if fit.context else {}),
    )


def changed_laws(old: Fit, new: Fit) -> list[str]:
    """What differs in the laws of two fits of one study, in words: `learning_rate of llama 0.0123, now 0.0131`."""

    def of(law: Mapping[str, Any]) -> tuple[str, str, str]:
        return law["hyperparameter"], law["family"], law["parametrisation"]

    newest = {of(law): law for law in new.laws}
    told = []
    for law in old.laws:
        now = newest.get(of(law))
        if now is None or any(law.get(key) != now.get(key) for key in ("refused", "value", "at", "powers")):
            told.append(f"{law['hyperparameter']} of {law['family']} {_in_short(law)}, now {_in_short(now)}")
    return told


def _in_short(law: Mapping[str, Any] | None) -> str:
    if law is None:
        return "gone"
    if law["refused"]:
        return "refused"
    at = ", ".join(f"{name} {law['at'][name]:.3g}" for name in law["powers"])
    powers = "".join(f" {name}^{power:.3g}" for name, power in law["powers"].items())
    return f"{law['value']:.4g}{f' at {at}' * bool(at)}{f' ({powers.strip()})' * bool(powers)}"


def fitted_studies(declared: Any) -> Iterator[str]:
    """Every study that is named as `{fitted: <study>}` anywhere in plain values such as a model's dump."""
    if isinstance(declared, Mapping):
        if isinstance(declared.get("fitted"), str):
            yield declared["fitted"]
        declared = list(declared.values())
    if isinstance(declared, list):
        for one in declared:
            yield from fitted_studies(one)


def _of_recipe(of: str, laws: list[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one of several laws, which differ in settings that their study crossed, whose settings are the recipe's."""
    settings = [law.get("recipe") or {} for law in laws]
    names = dict.fromkeys(name for held in settings for name in held)  # a law need not have all that another has
    crossed = [name for name in names if any(held.get(name) != settings[0].get(name) for held in settings)]
    mine = [law for law, held in zip(laws, settings) if all(held.get(k) == recipe.get(k) for k in crossed)]
    if len(laws) > 1 and len(mine) != 1:
        there = "; ".join(", ".join(f"{name} {held.get(name)}" for name in crossed) for held in settings)
        raise InputError(
            f"{of} has {len(laws)} laws, for {there or 'settings that it does not name'}, and {len(mine)} of them hold "
            "for this study's own. Give this study one of those settings."
        )
    return mine[0] if len(laws) > 1 else laws[0]


def _intervals(law: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Of the powers that have one: a bound that is open is null in the fit's file."""
    found = {name: (law.get("intervals") or {}).get(name) for name in law["powers"]}
    known = {name: one for name, one in found.items() if one and None not in one}
    return {name: (float(low), float(high)) for name, (low, high) in known.items()}


def _gives_batch(fit: Fit, law: Mapping[str, Any]) -> bool:
    """Whether the fit also has a law of the batch for what this law is of: then the two were found together."""
    of = (law["family"], law["parametrisation"])
    return any(
        other["hyperparameter"] == "batch_tokens"
        and not other["refused"]
        and (other["family"], other["parametrisation"]) == of
        for other in fit.laws
    )


def _reason(law: Mapping[str, Any]) -> str:
    verdicts = sorted(law.get("verdicts") or (), key=lambda one: one.get("severity") != "refuse")
    return str(verdicts[0]["message"]).rstrip(".") if verdicts else "the fit does not say why"
