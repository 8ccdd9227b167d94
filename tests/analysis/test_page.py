"""Parts of a page."""

import pytest

from analysis import page
from analysis.verdicts import Verdict


def budgets(count: int, severity: str = "caution") -> list[Verdict]:
    return [
        Verdict("few_steps", severity, f"budget {n}", "budget", f"too few steps at budget {n}") for n in range(count)
    ]


@pytest.mark.parametrize(("count", "folded"), [(1, 0), (page.FEW, 0), (page.FEW + 1, page.FEW)])
def test_the_first_of_many_verdicts_of_a_kind_speaks_for_those_that_are_folded_away(count: int, folded: int) -> None:
    html = page.verdicts(("", verdict) for verdict in budgets(count))
    shown, _, hidden = html.partition("<details>")
    assert "too few steps at budget 0" in shown
    assert (f"and {folded} more like it" in hidden) == bool(folded)
    assert hidden.count("too few steps") == folded
    assert html.count("too few steps") == count, "none is left out"


def test_verdicts_of_several_laws_are_one_and_refusals_come_first() -> None:
    said = [("power", budgets(1)[0]), ("chinchilla", budgets(1)[0]), ("power", budgets(1, "refuse")[0])]
    html = page.verdicts(said)
    assert html.index("<span class=refuse>") < html.index("<span class=caution>")
    assert "power, chinchilla: few_steps" in html
    assert html.count("<li>") == 2


def test_no_verdict_is_no_list() -> None:
    assert page.verdicts([]) == ""
