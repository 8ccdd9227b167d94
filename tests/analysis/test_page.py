"""Parts of a page."""

import pytest

from analysis import page
from analysis.verdicts import Verdict


def budgets(count: int, severity: str = "caution") -> list[Verdict]:
    return [Verdict("few_steps", severity, "budget", f"{n}e12", f"too few steps at budget {n}") for n in range(count)]


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, ""), (2, "the same of 1e12<"), (3, "the same of 1e12, 2e12<"), (page.FEW + 3, "8e12 and 2 more<")],
)
def test_the_first_of_many_verdicts_of_a_kind_speaks_for_those_that_are_folded_away(count: int, told: str) -> None:
    html = page.verdicts(("", verdict) for verdict in budgets(count))
    shown, _, hidden = html.partition("<details>")
    assert "too few steps at budget 0" in shown
    assert (told in hidden) if count > 1 else not hidden
    assert hidden.count("too few steps") == count - 1
    assert html.count("too few steps") == count, "none is left out"


def test_verdicts_of_a_kind_that_name_nothing_are_counted() -> None:
    said = [Verdict("repeated_losses", "caution", "fit", None, f"loss {n} twice") for n in range(3)]
    assert "<summary>and 2 more like it</summary>" in page.verdicts(("", verdict) for verdict in said)


def test_verdicts_of_several_laws_are_one_and_refusals_come_first() -> None:
    said = [("power", budgets(1)[0]), ("chinchilla", budgets(1)[0]), ("power", budgets(1, "refuse")[0])]
    html = page.verdicts(said)
    assert html.index("<span class=refuse>") < html.index("<span class=caution>")
    assert "power, chinchilla: few_steps" in html
    assert html.count("<li>") == 2


def test_no_verdict_is_no_list() -> None:
    assert page.verdicts([]) == ""
