"""Parts of an HTML page: pictures embedded, tables, numbers with their intervals, and one quiet style."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.verdicts import Estimate, Interval, Verdict
from sweeps.units import flops, human

DASH = "–"
FEW = 8
"""So many names are listed before the rest is counted."""


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def picture(figure: Figure | bytes, caption: str) -> str:
    """A figure, or its PNG, embedded with its caption."""
    content = figure if isinstance(figure, bytes) else png(figure)
    data = base64.b64encode(content).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def table(head: Sequence[str] | None, rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table of cells that are HTML already."""
    top = "<thead><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table class={kind}>{top}<tbody>{body}</tbody></table></div>"


def number(value: Any, digits: int = 4) -> str:
    """A number in a few digits; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return DASH
    text = f"{value:.{digits}g}"
    return flops(value) if "e" in text else text


def written(value: Any) -> str:
    """A setting: a whole number in full, any other in three digits, a word as it is; a dash where there is none."""
    if not isinstance(value, Real):
        return DASH if value is None else escape(str(value))
    return f"{value:,.0f}" if float(value).is_integer() else number(value, 3)


def plain(value: Any, form: Any) -> str:
    """A number or an estimate's value in a form of its own; a dash where there is none."""
    number = value.value if isinstance(value, Estimate) else value
    return DASH if number is None or not np.isfinite(number) else form(number)


def estimate(estimate: Estimate) -> str:
    """A count with its interval in words; an open end is called open."""
    if not np.isfinite(estimate.value):
        return DASH
    low, high = (human(bound) if np.isfinite(bound) else "open" for bound in estimate.interval)
    text = "interval open" if low == high == "open" else f"{low} to {high}"
    return f"{human(estimate.value)} <span class=range>{text}</span>"


def interval(bounds: Interval) -> str:
    """An interval in words: an open end is called above or below."""
    low, high = (number(bound, 3) for bound in bounds)
    if DASH in (low, high):
        return "interval open" if low == high else f"above {low}" if high == DASH else f"below {high}"
    return f"{low} to {high}"


def verdicts(said: Iterable[tuple[str, Verdict]]) -> str:
    """Verdicts as a list, each once, refusals first; a label, such as the law, tells who said it. Of several of
    a kind the first speaks, as on a terminal; the others are named or counted, and folded away. Empty for none."""
    seen: dict[tuple[str, str], tuple[Verdict, list[str]]] = {}
    for label, verdict in said:
        seen.setdefault((verdict.severity, verdict.message), (verdict, []))[1].append(label)
    order = {"refuse": 0, "caution": 1, "info": 2}
    kinds: dict[tuple[str, str], list[tuple[Verdict, str]]] = {}
    for verdict, labels in sorted(seen.values(), key=lambda entry: order[entry[0].severity]):
        who = ", ".join(filter(None, dict.fromkeys(labels)))
        code = f"{who}: {verdict.code}" if who else verdict.code
        item = (
            f"<li><span class={verdict.severity}>{verdict.severity}</span> {escape(verdict.message)} "
            f"<span class=code>{escape(code)}</span></li>"
        )
        kinds.setdefault((verdict.severity, code), []).append((verdict, item))
    items = []
    for (first, item), *others in kinds.values():
        items.append(item)
        if others:
            named = list(dict.fromkeys(str(v.target) for v, _ in others if v.target != first.target))
            few = ", ".join(named[:FEW]) + (f" and {len(named) - FEW} more" if len(named) > FEW else "")
            more = escape(f"the same of {few}" if named else f"and {len(others)} more like it")
            rest = "".join(item for _, item in others)
            items.append(
                f"<li class=more><details><summary>{more}</summary><ul class=verdicts>{rest}</ul></details></li>"
            )
    return f"<ul class=verdicts>{''.join(items)}</ul>" if items else ""


POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">"""
)
"""What a browser may do with the page: show it. No script runs, nothing is fetched, even if an escape were missed."""

STYLE = """
:root{color-scheme:light}
body{margin:0;background:#fff;color:#1d1d1f;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
.study{margin:0;color:#6a6a70;font-size:.9rem;letter-spacing:.02em}
h1{font-size:1.7rem;line-height:1.25;margin:.2rem 0 1rem}
h2{font-size:1.3rem;margin:2.6rem 0 .6rem;border-bottom:1px solid #ddd;padding-bottom:.25rem}
h3{font-size:1.05rem;margin:2rem 0 .5rem}
sup{line-height:0}
p{margin:.4rem 0;max-width:48rem}
.answer{font-size:1.12rem;border-left:4px solid #3b6fb6;padding:.2rem 0 .2rem 1rem;margin:1rem 0}
.partial{color:#8a4b00;font-weight:600}
.note,.range,.code,figcaption{color:#6a6a70;font-size:.86rem}
.range{white-space:nowrap}
.code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.78rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.28rem .7rem;border-bottom:1px solid #e6e6ea;vertical-align:top;text-align:right}
th{font-weight:600;color:#444;vertical-align:bottom}
th:first-child,td:first-child,table.facts td{text-align:left}
table.facts td:first-child{color:#6a6a70;white-space:nowrap}
ul.verdicts{padding:0;list-style:none;max-width:52rem}
ul.verdicts li{margin:.45rem 0;padding-left:5rem;text-indent:-5rem}
ul.verdicts li.more{text-indent:0}.more summary{cursor:pointer;color:#6a6a70;font-size:.86rem}
.more ul.verdicts{margin-left:-5rem}
.info,.caution,.refuse{display:inline-block;width:4.3rem;margin-right:.7rem;text-indent:0;text-align:center;
 border-radius:.25rem;font-size:.76rem;font-weight:600}
.info{background:#e8eef7;color:#23508f}.caution{background:#fdf0d9;color:#8a4b00}.refuse{background:#fbe3e1;color:#a1231a}
figure{margin:1.2rem 0 1.8rem;break-inside:avoid}
img{max-width:100%;height:auto}
@media print{main{max-width:none;padding:0}body{font-size:11pt}h2,h3{break-after:avoid}tr,li{break-inside:avoid}
 .scroll{overflow:visible}table{font-size:8pt}th,td{padding:.15rem .35rem}}
"""
