"""The laws: parametric forms as data, each with its variables, parameters, bounds, starts and source.

A law is either a sum of `terms`, coefficient x exp(sum of exponent x feature), which the solver knows how to centre,
differentiate and start by itself, or a `formula` for the logarithm of the response, which it differentiates by the
complex step (Squire & Trapp 1998), exact to rounding. Formulas must therefore be analytic in their parameters: no
abs, no min and max over them (use `smaller`). Natural logarithms, nats, parameters, tokens, FLOPs.

To add a law, add one object and its known answer to the tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from sweeps.errors import InputError, nearest

Array = np.ndarray
Values = Mapping[str, Any]
"""Variables or parameters by name: numbers or arrays that broadcast."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter that is searched between bounds, from starts; `log` searches its logarithm.

    position: the variable on which it is a place; its starts are then shares of the way, in logarithms, from the
    smallest value of that variable to the largest.
    """

    name: str
    low: float
    high: float
    starts: tuple[float, ...]
    log: bool = False
    position: str = ""


@dataclass(frozen=True)
class Term:
    """coefficient x exp(sum over exponents of exponent x feature); a coefficient is positive.

    `features` maps an exponent to its feature, a function of the variables.
    """

    coefficient: str
    features: Mapping[str, Callable[[Values], Array]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Law:
    """A parametric form y = f(variables; parameters) with y > 0, fitted in ln y.

    parameters: those of the formula; of a law of terms its exponents, since coefficients are bounded and started from
    the data. published: constants as printed or released, by source; exponents of few digits are not for evaluation.
    """

    name: str
    source: str
    variables: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...] = ()
    formula: Callable[[Values, Values], Array] | None = None
    """(parameters, variables) -> ln y."""
    linear: tuple[str, ...] = ()
    """Positive parameters of a formula in which y is a linear form: their starts are solved for."""
    response: str = "loss"
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in the order that the solver keeps them."""
        return (*(term.coefficient for term in self.terms), *(p.name for p in self.parameters))

    def log_response(self, variables: Values, params: Values) -> Array:
        """ln y; arrays of variables and parameters broadcast with each other."""
        if self.formula is not None:
            return self.formula(params, variables)
        return np.log(sum_of_terms(self.terms, variables, params))

    def __call__(self, variables: Values, params: Values) -> Array:
        """y: nats per token where the response is a loss."""
        return np.exp(self.log_response(variables, params))


def sum_of_terms(terms: tuple[Term, ...], variables: Values, params: Values) -> Any:
    """The terms' sum at the variables."""
    return sum(
        params[term.coefficient] * np.exp(sum(params[k] * x(variables) for k, x in term.features.items()))
        for term in terms
    )


def find_law(name: str) -> Law:
    """A law by its name; bnsl:<n> is a broken power law of n breaks. InputError where there is none."""
    if name.startswith("bnsl:") and name[5:].isdigit() and 1 <= int(name[5:]) <= 4:
        return broken_power_law(int(name[5:]))
    if name not in LAWS:
        known = [*LAWS, "bnsl:<breaks>", "isoflop", "akima"]  # the last two are fits of budgets, not forms
        raise InputError(f"unknown law {name!r}{nearest(name, known)}. Known laws: {', '.join(known)}.")
    return LAWS[name]


# --- pieces ------------------------------------------------------------------------------------------------------


def _exponent(name: str, low: float = 0.01, high: float = 3.0) -> Parameter:
    return Parameter(name=name, low=low, high=high, starts=(0.08, 0.2, 0.35, 0.5, 0.8, 1.3))


def _positive(name: str, low: float, high: float, *starts: float) -> Parameter:
    return Parameter(name=name, low=low, high=high, starts=starts, log=True)


def _free(name: str, low: float, high: float, *starts: float) -> Parameter:
    return Parameter(name=name, low=low, high=high, starts=starts)


def _place(name: str, low: float, high: float, variable: str, log: bool = False) -> Parameter:
    return Parameter(name=name, low=low, high=high, starts=(0.1, 0.3, 0.5, 0.7, 0.9), log=log, position=variable)


def log_sum(*terms: Any) -> Array:
    """ln of the sum of exponentials, for complex terms as for real ones."""
    real = [np.real(t) for t in terms]
    top = real[0]
    for other in real[1:]:
        top = np.maximum(top, other)
    return np.asarray(top + np.log(sum(np.exp(t - top) for t in terms)))


def smaller(a: Any, b: Any) -> Array:
    """The smaller of two, by their real parts: a minimum that the complex step passes through."""
    return np.where(np.real(a) < np.real(b), a, b)


def _over(name: str) -> Callable[[Values], Array]:
    """The feature of a term that falls as a power of a variable."""
    return lambda v: -np.log(v[name])


# --- loss --------------------------------------------------------------------------------------------------------

SATURATING = Law(
    name="saturating",  # L = E + A / x^alpha
    source="M2 of Alabdulmohsin et al. 2022 (arXiv 2209.06640); e.g. L(C) with a floor",
    variables=("x",),
    terms=(Term("E"), Term("A", {"alpha": _over("x")})),
    parameters=(_exponent("alpha"),),
)

CHINCHILLA = Law(
    name="chinchilla",  # L = E + A / N^alpha + B / D^beta
    source="Hoffmann et al. 2022 (arXiv 2203.15556), approach 3",
    variables=("N", "D"),
    terms=(Term("E"), Term("A", {"alpha": _over("N")}), Term("B", {"beta": _over("D")})),
    parameters=(_exponent("alpha"), _exponent("beta")),
    published={
        "Hoffmann et al. 2022, TeX source": {
            "E": float(np.exp(0.5267228)), "A": float(np.exp(6.0073404)), "B": float(np.exp(6.0179186)),
            "alpha": 0.33917084, "beta": 0.2849083,
        },
        "Besiroglu et al. 2024": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    },
)  # fmt: skip

CHINCHILLA_TIED = Law(
    name="chinchilla_tied",  # L = E + A / N^alpha + B / D^alpha
    source="Muennighoff et al. 2023 (arXiv 2305.16264), stage 1",
    variables=("N", "D"),
    terms=(Term("E"), Term("A", {"alpha": _over("N")}), Term("B", {"alpha": _over("D")})),
    parameters=(_exponent("alpha"),),
    published={
        "Muennighoff et al. 2023": {
            "E": float(np.exp(0.6254804)), "A": float(np.exp(6.255414)), "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596,
        }
    },
)  # fmt: skip

GADRE = Law(
    name="gadre",  # L = E + (a M^h + b M^-h) C^-h, M = D / N, C = 6 N D
    source="Gadre et al. 2024 (arXiv 2403.08540), eq. 4",
    variables=("N", "D"),
    terms=(
        Term("E"),
        Term("a", {"h": lambda v: -np.log(6.0) - 2.0 * np.log(v["N"])}),
        Term("b", {"h": lambda v: -np.log(6.0) - 2.0 * np.log(v["D"])}),
    ),
    parameters=(_exponent("h", high=1.5),),
    published={
        "C4": {"a": 141.0, "b": 190.0, "h": 0.1212, "E": 1.508},
        "RedPajama": {"a": 212.2361102, "b": 366.6871738, "h": 0.1364253513, "E": 1.8366483784},
        "RefinedWeb": {"a": 157.0, "b": 246.0, "h": 0.1272, "E": 1.734},
    },
)


def _kaplan(variable: str, constant: str, published: Mapping[str, Mapping[str, float]]) -> Law:
    """L = (constant / variable)^alpha."""
    return Law(
        name=f"kaplan_{variable}",
        source=f"Kaplan et al. 2020 (arXiv 2001.08361): L({variable}) = ({constant} / {variable})^alpha",
        variables=(variable,),
        parameters=(_positive(constant, 1e-3, 1e40, 1e8, 1e13, 1e18), _exponent("alpha", low=0.005)),
        formula=lambda p, v: p["alpha"] * (np.log(p[constant]) - np.log(v[variable])),
        published=published,
    )


KAPLAN_N = _kaplan(
    "N",
    "Nc",
    {
        "Kaplan et al. 2020": {"Nc": 8.8e13, "alpha": 0.076},
        "Clark et al. 2022, dense": {"Nc": 3.568e13, "alpha": 0.078},
    },
)
KAPLAN_D = _kaplan("D", "Dc", {"Kaplan et al. 2020": {"Dc": 5.4e13, "alpha": 0.095}})
KAPLAN_C = _kaplan(
    "C",
    "Cc",
    {  # two different curves: compute of runs at one batch size, and the least that training at small batches needs
        "Kaplan et al. 2020, C_min": {"Cc": 3.1e8 * 8.64e19, "alpha": 0.050},
        "Kaplan et al. 2020, fixed batch": {"Cc": 1.6e7 * 8.64e19, "alpha": 0.057},
    },
)

KAPLAN = Law(
    name="kaplan",  # L = ((Nc / N)^(alpha / beta) + Dc / D)^beta
    source="Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.5; N without embeddings",
    variables=("N", "D"),
    parameters=(
        _positive("Nc", 1e2, 1e40, 1e10, 1e14), _positive("Dc", 1e2, 1e40, 1e10, 1e14),
        _exponent("alpha", low=0.005), _exponent("beta", low=0.005),
    ),
    formula=lambda p, v: p["beta"] * log_sum(
        p["alpha"] / p["beta"] * (np.log(p["Nc"]) - np.log(v["N"])), np.log(p["Dc"]) - np.log(v["D"])
    ),
    published={"Kaplan et al. 2020": {"Nc": 6.4e13, "Dc": 1.8e13, "alpha": 0.076, "beta": 0.103}},
)  # fmt: skip


def worth(amount: Any, repeats: Any, halflife: Any) -> Any:
    """What an amount and its repeats are worth: U + U R* (1 - exp(-R / R*))."""
    return amount + amount * halflife * (1.0 - np.exp(-repeats / halflife))


def _data_constrained(p: Values, v: Values) -> Array:
    alpha, beta = p["alpha"], p["beta"]
    unique = np.minimum(v["U"], v["D"])
    # parameters that the unique tokens can use: the compute-optimal N for U tokens, N = (G^(1/a) U)^(a/b), C = 6 N D
    a, b = beta / (alpha + beta), alpha / (alpha + beta)
    G = (alpha * p["A"] / (beta * p["B"])) ** (1.0 / (alpha + beta))
    usable = smaller(v["N"], G * (G * unique) ** (a / b))
    data = worth(unique, v["D"] / unique - 1.0, p["RD"])
    size = worth(usable, v["N"] / usable - 1.0, p["RN"])
    return np.asarray(np.log(p["E"] + p["A"] * size**-alpha + p["B"] * data**-beta))


DATA_CONSTRAINED = Law(
    name="data_constrained",  # Chinchilla in what N and D are worth when D repeats U unique tokens
    source="Muennighoff et al. 2023 (arXiv 2305.16264), eq. 6; stage 2 fits RD and RN with the others fixed",
    variables=("N", "D", "U"),
    parameters=(
        _positive("E", 0.05, 20.0, 1.5), _positive("A", 1e-2, 1e9, 400.0), _positive("B", 1e-2, 1e12, 1000.0),
        _exponent("alpha"), _exponent("beta"),
        _positive("RD", 0.05, 5000.0, 1.5, 6.0, 15.0, 100.0), _positive("RN", 0.05, 5000.0, 1.5, 6.0, 15.0),
    ),
    formula=_data_constrained,
    published={
        "Muennighoff et al. 2023": {
            "E": float(np.exp(0.6254804)), "A": float(np.exp(6.255414)), "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596, "beta": 0.3526596, "RD": 15.387756, "RN": 5.309743,
        }
    },
)  # fmt: skip


def _clark(p: Values, v: Values) -> Array:
    saturated = 1.0 / p["Emax"] + 1.0 / (v["experts"] - 1.0 + 1.0 / (1.0 / p["Estart"] - 1.0 / p["Emax"]))
    n, e = np.log10(v["N"]), -np.log10(saturated)
    return np.asarray(np.log(10.0) * (p["a"] * n + p["b"] * e + p["c"] * n * e + p["d"]))


CLARK = Law(
    name="clark",  # log10 L = a log10 N + b log10 Eh + c log10 N log10 Eh + d, Eh saturating in the expert count
    source="Clark et al. 2022 (arXiv 2202.01169), eq. 2 and 9; N is the dense-equivalent active size",
    variables=("N", "experts"),
    parameters=(
        _free("a", -1.0, 0.0, -0.15, -0.08, -0.04), _free("b", -2.0, 0.5, -0.2, -0.1, -0.02),
        _free("c", -0.2, 0.2, 0.01), _free("d", -2.0, 4.0, 0.5, 1.1, 2.0),
        _positive("Estart", 1.0, 50.0, 1.5, 4.0), _positive("Emax", 51.0, 1e5, 100.0, 1000.0),
    ),
    formula=_clark,
    published={
        "S-BASE": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "Estart": 1.847, "Emax": 314.478},
        "RL-R": {"a": -0.083, "b": -0.126, "c": 0.012, "d": 1.111, "Estart": 1.880, "Emax": 469.982},
        "HASH": {"a": -0.087, "b": -0.136, "c": 0.012, "d": 1.157, "Estart": 4.175, "Emax": 477.741},
    },
)  # fmt: skip


@lru_cache(maxsize=8)
def broken_power_law(breaks: int) -> Law:
    """y = a + b x^-c0 prod_i (1 + (x / d_i)^(1 / f_i))^(-c_i f_i), Caballero et al. 2022 (arXiv 2210.14891), eq. 1.

    The numbering of breaks means nothing: d_1 may lie beyond d_2.
    """

    def formula(p: Values, v: Values) -> Array:
        x = np.log(v["x"])
        falling = np.log(p["b"]) - p["c0"] * x
        for i in range(1, breaks + 1):
            falling = falling - p[f"c{i}"] * p[f"f{i}"] * log_sum(0.0 * x, (x - np.log(p[f"d{i}"])) / p[f"f{i}"])
        return log_sum(np.log(p["a"]) + 0.0 * x, falling)

    parameters = [_positive("a", 1e-9, 1e3, 1.0), _positive("b", 1e-9, 1e40, 1.0)]
    parameters.append(_free("c0", -0.5, 3.0, 0.02, 0.1, 0.3))
    for i in range(1, breaks + 1):
        parameters += [
            _free(f"c{i}", -3.0, 3.0, -0.15, 0.15, 0.5),
            _place(f"d{i}", 1e-3, 1e30, "x", log=True),
            _positive(f"f{i}", 0.02, 10.0, 0.3),
        ]
    return Law(
        name=f"bnsl:{breaks}",
        source="Caballero et al. 2022 (arXiv 2210.14891), eq. 1",
        variables=("x",),
        parameters=tuple(parameters),
        formula=formula,
        linear=("a", "b"),
    )


TISSUE = Law(
    name="tissue",  # L = L0 + A S1^-alpha - C S2, S1 and S2 from `tissue_areas`
    source="Tissue et al. 2024 (arXiv 2408.11029), eq. 1; constants depend on the unit of the learning rate",
    variables=("S1", "S2"),
    parameters=(
        _positive("L0", 0.05, 20.0, 0.5, 1.5, 2.5), _positive("A", 1e-6, 1e6, 0.03, 0.3, 3.0, 30.0),
        _exponent("alpha"), _positive("C", 1e-9, 1e6, 1e-4, 1e-2, 1.0, 100.0),
    ),
    formula=lambda p, v: np.log(p["L0"] + p["A"] * v["S1"] ** -p["alpha"] - p["C"] * v["S2"]),
)  # fmt: skip


def tissue_areas(learning_rates: Array, decay: float = 0.999) -> tuple[Array, Array]:
    """S1 and S2 at every step of a schedule (arXiv 2408.11029): learning_rates (steps + 1,), the first before step 1.

    S1 is the sum of rates, S2 the sum of the momentum m_i = decay m_(i-1) + (rate_(i-1) - rate_i). Both (steps,).
    """
    rates = np.asarray(learning_rates, dtype=float)
    momentum = np.zeros(len(rates))
    for i in range(1, len(rates)):
        momentum[i] = decay * momentum[i - 1] + rates[i - 1] - rates[i]
    return np.cumsum(rates[1:]), np.cumsum(momentum[1:])


# --- from loss to tasks --------------------------------------------------------------------------------------------

ACCURACY = Law(
    name="accuracy",  # accuracy = b + a / (1 + exp(k (loss - L0)))
    source="Bhagia et al. 2024 (arXiv 2412.04403), step 2; b is near chance",
    variables=("loss",),
    response="accuracy",
    parameters=(
        _positive("b", 1e-3, 1.0, 0.1), _positive("a", 1e-3, 1.5, 0.75),
        _positive("k", 1e-2, 1e3, 1.0, 4.0, 16.0), _place("L0", 0.0, 20.0, "loss"),
    ),
    linear=("b", "a"),
    formula=lambda p, v: np.log(p["b"] + p["a"] / (1.0 + np.exp(p["k"] * (v["loss"] - p["L0"])))),
)  # fmt: skip

ERROR = Law(
    name="error",  # error = eps - k exp(-g loss)
    source="Gadre et al. 2024 (arXiv 2403.08540), eq. 5: mean top-1 error over tasks above chance",
    variables=("loss",),
    response="error",
    parameters=(
        _positive("eps", 0.05, 2.0, 0.6, 0.9), _positive("k", 1e-2, 1e3, 0.5, 2.0, 8.0),
        _positive("g", 0.02, 20.0, 0.3, 0.8, 2.0),
    ),
    formula=lambda p, v: np.log(p["eps"] - p["k"] * np.exp(-p["g"] * v["loss"])),
    published={
        "C4, 17 tasks": {"eps": 0.850, "k": 2.08, "g": 0.756},
        "RedPajama, 17 tasks": {"eps": 0.857, "k": 2.21, "g": 0.715},
        "RefinedWeb, 17 tasks": {"eps": 0.865, "k": 2.21, "g": 0.707},
        "RedPajama, 46 tasks": {"eps": 0.761, "k": 1.32, "g": 0.891},
    },
)  # fmt: skip

LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        CHINCHILLA, CHINCHILLA_TIED, SATURATING, KAPLAN, KAPLAN_N, KAPLAN_D, KAPLAN_C, GADRE, DATA_CONSTRAINED, CLARK,
        TISSUE, ACCURACY, ERROR,
    )
}  # fmt: skip
