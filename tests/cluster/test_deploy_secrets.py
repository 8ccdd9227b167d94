"""Who follows the READMEs of cluster/deploy has secrets outside the repository; none in it gets into what is built."""

import glob
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from commandline import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
SECRETS = [
    ".env",
    "mlflow.env",
    "x.password",
    "mlflow/admin.password",
    "mlflow/.env",
    "mlflow/mlflow.env",
    "slurm/token",
]
MLFLOW = (DEPLOY / "mlflow" / "README.md").read_text()


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """A copy of the folder, with secrets in it."""
    copy = tmp_path / "cluster" / "deploy"
    shutil.copytree(DEPLOY, copy)
    for name in SECRETS:
        (copy / name).write_text("secret")
    return copy


def test_the_package_takes_all_that_belongs_there_and_no_secret(littered: Path) -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cluster"]
    taken = {name for one in patterns for name in glob.glob(one, root_dir=littered.parent, recursive=True)}
    files = {path.relative_to(littered.parent).as_posix() for path in littered.rglob("*") if path.is_file()}
    assert {name for name in taken if (littered.parent / name).is_file()} == files - {
        f"deploy/{one}" for one in SECRETS
    }


def let_in(patterns: list[str], path: str) -> bool:
    """Whether a file gets into an image's context: the last pattern that matches it, or a folder above it, says."""
    inside = True
    places = [path, *(one.as_posix() for one in Path(path).parents if one.name)]
    for line in patterns:
        expression = re.escape(line.lstrip("!").rstrip("/")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, place) for place in places):
            inside = line.startswith("!")
    return inside


@pytest.mark.parametrize("image", ["image", "mlflow"])
def test_no_secret_gets_into_an_image(image: str, littered: Path) -> None:
    lines = (DEPLOY / image / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert let_in(patterns, "constraints.txt")
    assert let_in(patterns, "cluster/driver.py") is (image == "image")
    files = [f"cluster/deploy/{name}" for name in SECRETS] + ["mlflow.env", "sweeps/.env", "cluster/mine.password"]
    assert [one for one in files if let_in(patterns, one)] == []


def test_git_overlooks_secrets_but_none_of_the_repositorys_files(littered: Path) -> None:
    top = littered.parent.parent
    shutil.copy(ROOT / ".gitignore", top)
    subprocess.run(["git", "init", "--quiet", top], check=True)
    command = ["git", "-C", top, "ls-files", "--others", "--exclude-standard", "cluster"]
    seen = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert seen == {path.relative_to(ROOT).as_posix() for path in DEPLOY.rglob("*") if path.is_file()} | {
        "cluster/deploy/slurm/token"  # a name that says nothing
    }


def block(heading: str) -> str:
    """The shell of a section of MLflow's README."""
    return MLFLOW.partition(f"\n## {heading}\n")[2].partition("```sh\n")[2].partition("```")[0]


def followed(commands: str, home: Path, typed: str = "", **played: str) -> dict[str, tuple[int, str]]:
    """What the commands of a README leave below HOME, with these programs played: permissions and content. In the
    repository they leave nothing."""
    programs, repository = home / "programs", home.parent / "repository"
    programs.mkdir(parents=True)
    for name, words in played.items():
        (programs / name).write_text(f"#!/bin/sh\n{words}\n")
        (programs / name).chmod(0o755)
    shutil.copytree(DEPLOY, repository / "cluster" / "deploy")
    before = sorted(repository.rglob("*"))
    environment = {**os.environ, "HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", commands], cwd=repository, env=environment, input=typed, text=True, timeout=60)
    assert sorted(repository.rglob("*")) == before
    files = [path for path in home.rglob("*") if path.is_file() and path.parent != programs]
    return {path.relative_to(home).as_posix(): (path.stat().st_mode & 0o777, path.read_text()) for path in files}


def test_the_secrets_of_mlflow_with_docker_are_below_home_and_for_their_owner_alone(tmp_path: Path) -> None:
    left = followed(block("With Docker"), tmp_path / "a home", docker="true")
    assert {name: mode for name, (mode, _) in left.items()} == {".escala-mlflow/.env": 0o600}


def test_the_settings_of_mlflow_without_docker_are_below_home_and_hold_where_a_path_has_blanks(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    before, _, after = block("Without Docker").partition("python3 -m venv")
    making = before + after.partition("\n")[2].partition("\n. ")[0]
    left = followed(making, home, sudo="true")
    ((name, (mode, _)),) = left.items()
    assert (name, mode) == (".escala-mlflow/mlflow.env", 0o600)
    told = subprocess.run(
        ["sh", "-c", f'. "{home / name}" && printf %s "$MLFLOW_ARTIFACTS_DESTINATION"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == str(home / ".escala-mlflow" / "artifacts")


CURL = """
sent=$(for one; do case $one in @/dev/fd/* | /dev/fd/*) cat "${one#@}"; esac; done)
echo "$*" $sent >> "$HOME/asked"
case $* in *"-X $REFUSED "*) exit 22; esac
"""


@pytest.mark.parametrize("refused", ["nothing", "PATCH", "POST"])
def test_the_files_of_passwords_hold_those_that_the_server_took(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", refused)
    home = tmp_path / "home"
    (home / ".escala-mlflow").mkdir(parents=True)
    for name in ("admin", "cluster"):
        (home / ".escala-mlflow" / f"{name}.password").write_text("before")
    left = followed(block("Accounts"), home, "first\n", curl=CURL)
    patch, post = left["asked"][1].splitlines()
    assert '"current_password": "first"' in patch
    (mode, admin), (_, cluster) = (left[f".escala-mlflow/{name}.password"] for name in ("admin", "cluster"))
    if refused == "PATCH":
        assert admin == "before"
        assert 'user = "admin:first"' in post
    else:
        assert mode == 0o600
        assert f', "password": "{admin.strip()}"' in patch
        assert f'user = "admin:{admin.strip()}"' in post
    assert (cluster == "before") if refused == "POST" else f'"password": "{cluster.strip()}"' in post
