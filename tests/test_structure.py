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
    "sweeps.cellrow",
    "sweeps.errors",
    "sweeps.foreign",
    "sweeps.hosts",
    "sweeps.published",
    "sweeps.records",
    "sweeps.redaction",
    "sweeps.rules",
    "sweeps.rungs",
    "sweeps.store",
    "sweeps.units",
}


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


SOURCES = [ROOT / "escala.py", *(path for package in ("sweeps", "cluster", "analysis") for path in modules(package))]
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNS_CODE = {"sweeps/usercode.py": {"exec"}}
"""Where a user's own file is run, after --allow-code."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_unsafe_slips_in(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(path)} & PICKLES
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert set(filter(None, map(unsafe, calls))) <= RUNS_CODE.get(path.relative_to(ROOT).as_posix(), set())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not [text for text in texts if "0.0.0.0" in text], "servers listen on loopback"


def unsafe(call: ast.Call) -> str | None:
    """What is unsafe about a call: it would run what a file or a text says."""
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    true = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
    if name in ("eval", "exec", "__import__", "os.system", "os.popen"):
        return name
    if name in ("yaml.load", "yaml.load_all") and "Loader" in given and ast.unparse(given["Loader"]) == "_Loader":
        return None  # a SafeLoader (sweeps/studyfile.py)
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pd.eval"):
        return name
    if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
        return f"{name} without allow_pickle=False"
    if name == "torch.load" and "weights_only" not in true:
        return f"{name} without weights_only=True"
    return next(iter(true & {"shell", "allow_pickle", "trust_remote_code"}), None)


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)",
        "exec(x)",
        "os.system(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.load(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "subprocess.run(x, shell=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_what_is_unsafe_is_seen(text: str) -> None:
    (call,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    assert unsafe(call)


PRINTING = ["escala.py", *(f"cluster/{one.name}" for one in sorted((ROOT / "cluster").glob("*.py")))]


@pytest.mark.parametrize("name", [name for name in PRINTING if name != "cluster/terminal.py"])
def test_what_is_for_people_is_printed_without_secrets_and_escape_sequences(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            assert ast.unparse(node.args[0]).startswith("json.dumps("), "say() of cluster/terminal.py prints it"
