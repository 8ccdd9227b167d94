"""Dependencies point one way, heavy imports stay out of what only plans or prints, and nothing unsafe slips in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANALYSIS_MAY_USE = {
    "sweeps.accounting",
    "sweeps.published",
    "sweeps.rules",
    "sweeps.store",
    "sweeps.records",
    "sweeps.foreign",
    "sweeps.errors",
}
ANALYSIS_MAY_USE |= {"sweeps.units", "sweeps.records"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
            )


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", modules("sweeps"), ids=lambda path: path.stem)
def test_sweeps_knows_neither_ray_nor_mlflow_nor_the_rooms_above(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"ray", "mlflow", "cluster", "analysis", "escala"}


@pytest.mark.parametrize("path", modules("analysis"), ids=lambda path: path.stem)
def test_analysis_knows_only_the_torch_free_rooms(path: Path) -> None:
    names = set(imports(path))
    tops = {name.split(".")[0] for name in names}
    assert not tops & {"ray", "torch", "transformers", "cluster", "escala"}
    used = {name for name in names if name.startswith("sweeps.")}
    assert used <= ANALYSIS_MAY_USE, used - ANALYSIS_MAY_USE
    if path.stem != "runs":
        assert "mlflow" not in tops, "only the reader knows MLflow"


@pytest.mark.parametrize("path", modules("cluster"), ids=lambda path: path.stem)
def test_cluster_does_not_know_the_front_door(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"escala", "analysis"}


@pytest.mark.parametrize("package", ["sweeps", "cluster", "analysis"])
def test_no_circle_inside_a_package(package: str) -> None:
    graph = {
        f"{package}.{path.stem}": {name for name in imports(path) if name.startswith(f"{package}.")}
        for path in modules(package)
        if path.stem != "__init__"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done or name not in graph:
            return
        for below in graph[name] - {name}:
            visit(below, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "code",
    [
        "import escala",
        "import sweeps.grids, sweeps.study, sweeps.store, sweeps.corpora, cluster.ledger, cluster.summary",
        "import sweeps.sizes, sweeps.accounting",
        "import analysis, analysis.runs",
    ],
)
def test_planning_and_printing_load_nothing_heavy(code: str) -> None:
    check = "import sys; heavy = {'torch', 'transformers', 'ray', 'mlflow', 'optuna', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {check}; assert not heavy, heavy"], check=True, cwd=ROOT)


def test_no_pickle_and_no_unsafe_yaml() -> None:
    for path in [
        ROOT / "escala.py",
        *(path for package in ("sweeps", "cluster", "analysis") for path in modules(package)),
    ]:
        names = set(imports(path))
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        assert "unsafe_load" not in path.read_text(), path
        assert "allow_pickle=True" not in path.read_text(), path
