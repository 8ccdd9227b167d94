"""The charts that `escala ui` opens in MLflow: every run, losses over tokens and over FLOPs, final loss over size.

MLflow keeps a shared view of an experiment as JSON in one of its tags; this writes such a tag. The fields are those
of MLflow 3.17; a version that knows them no longer shows its own default charts instead.
"""

import json
from typing import Any

SHARE_KEY = "escala"
TAG = f"mlflow.sharedViewState.{SHARE_KEY}"
MAX_TAG_CHARACTERS = 5000
"""MLflow's limit on an experiment's tag."""
_LOSSES, _DETAILS = "losses", "details"


def shared_view() -> str:
    """The tag's value."""
    charts = [
        _line("val_loss"),
        _line("val_loss", over="flops"),
        _line("train_loss"),
        _scatter("N", "val_loss_final"),
        _line("learning_rate", section=_DETAILS, scale="linear"),
        _line("gradient_norm", section=_DETAILS),
        _line("tokens_per_second", section=_DETAILS, scale="linear"),
    ]
    sections = [
        {"uuid": _LOSSES, "name": "Losses", "display": True, "isReordered": True, "deleted": False},
        {"uuid": _DETAILS, "name": "Details", "display": True, "isReordered": True, "deleted": False},
    ]
    view = {
        "runsHiddenMode": "SHOWALL",
        # By any key but the start, the UI lists the cells beside the study's own run, not folded away below it.
        "orderByKey": "metrics.`val_loss_final`",
        "orderByAsc": True,
        "selectedColumns": [f"params.`{name}`" for name in ("N", "D", "C", "learning_rate", "seed")]
        + ["metrics.`val_loss_final`"],
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }
    value = json.dumps(view, separators=(",", ":"))
    assert len(value) <= MAX_TAG_CHARACTERS
    return value


# A step is training tokens, so a line over steps is one over tokens.
def _line(metric: str, over: str = "", section: str = _LOSSES, scale: str = "log") -> dict[str, Any]:
    return {
        "uuid": f"{metric}-{over or 'tokens'}",
        "type": "LINE",
        "runsCountToCompare": 200,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisScaleType": scale,
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "metric" if over else "step",
        "selectedXAxisMetricKey": over,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
    }


def _scatter(param: str, metric: str) -> dict[str, Any]:
    return {
        "uuid": f"{metric}-{param}",
        "type": "SCATTER",
        "runsCountToCompare": 200,
        "metricSectionId": _LOSSES,
        "deleted": False,
        "isGenerated": False,
        "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }
