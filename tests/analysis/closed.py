"""The closed form of the compute-optimal split, exact under C = 6 N D: what numerical optima are held to."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.allocation import Optimum
from analysis.laws import CHINCHILLA


def closed_form(C: Any, params: Mapping[str, Any]) -> Optimum:
    """The Chinchilla optimum under C = 6 N D exactly: N = G (C/6)^a, D = (C/6)^b / G (Hoffmann et al. 2022, eq. 4)."""
    alpha, beta = params["alpha"], params["beta"]
    a = beta / (alpha + beta)
    G = (alpha * params["A"] / (beta * params["B"])) ** (1.0 / (alpha + beta))
    flops = np.asarray(C, dtype=float) / 6.0
    N, D = G * flops**a, flops ** (1.0 - a) / G
    return Optimum(N, D, np.asarray(CHINCHILLA({"N": N, "D": D}, params)))
