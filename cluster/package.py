"""The package of a job: the few files that go to a cluster, chosen by what is wanted, not by what lies around.

Guarded against: a working directory of gigabytes. Ray keeps it in the head's memory and sends it to every node, and
what lies beside a study is most often a store, a virtual environment or a repository's history. So Escala's own code
goes, the study file, and what the study names; the folder beside it only where its code is allowed. And a link in a
stranger's folder, which would send what lies elsewhere.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sweeps.errors import InputError
from sweeps.paths import inside
from sweeps.study import Study
from sweeps.studyfile import SHIPPED
from sweeps.tokenizers import tokenizer_file

LARGEST_BYTES = 50 * 1000**2
"""Of all files together. Ray's own limit, that of one gRPC message, comes later and is less kind."""
MOST_FILES = 5000
CODE = Path(__file__).resolve().parent.parent
"""The folder of escala.py and its packages."""
PACKAGES = ("sweeps", "cluster", "analysis")
BESIDE = PurePosixPath("study")
"""Where a study file and what lies beside it stand in the package."""
LEFT_OUT = {"__pycache__", "venv", "env", "node_modules", "build", "dist", "mlruns", "notebooks", "tests"}
"""Folders beside a study that are never packed; hidden ones, stores and virtual environments besides."""
SUFFIXES_LEFT_OUT = (".ipynb", ".pyc", ".pem", ".key")


@dataclass(frozen=True)
class Package:
    """Files by their place in the package."""

    files: dict[PurePosixPath, Path]
    study: str
    """The study as `escala run` finds it from the package's root: its file there, or a shipped study's name."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by place, the largest first."""
        sizes = {str(place): path.stat().st_size for place, path in self.files.items()}
        return dict(sorted(sizes.items(), key=lambda one: -one[1]))

    @property
    def digest(self) -> str:
        """A short hash over places and contents: equal packages run the same code and study."""
        found = hashlib.sha256()
        for place, path in sorted(self.files.items()):
            found.update(f"{place}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return found.hexdigest()[:12]

    def write(self, folder: Path) -> None:
        """Copy the files to where they belong below a folder."""
        for place, path in self.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def make_package(path: Path, study: Study, *, allow_code: bool) -> Package:
    """What a study needs on a cluster: the code, its file, and what it names by a path relative to it.

    With `allow_code` also the folder of the file. Raises InputError where that is too large, or a named path would not
    be on the cluster.
    """
    files = {
        PurePosixPath(one.relative_to(CODE)): one
        for name in PACKAGES
        for one in _below(CODE / name)
        if one.suffix in (".py", ".yaml")
    }
    files[PurePosixPath("escala.py")] = CODE / "escala.py"
    path = path.resolve()
    shipped = path.parent == SHIPPED.resolve()
    if not shipped:
        files[BESIDE / path.name] = path
        files |= _named(path, study)
        if allow_code:
            files |= {BESIDE / _inside(one, path.parent, "--allow-code"): one for one in _below(path.parent)}
    package = Package(files, path.stem if shipped else str(BESIDE / path.name))
    total = sum(package.sizes.values())
    if total > LARGEST_BYTES or len(files) >= MOST_FILES:
        raise InputError(_too_large(package, total, path.parent if allow_code else None))
    return package


def _named(path: Path, study: Study) -> dict[PurePosixPath, Path]:
    """The files of a corpus and a tokenizer that the study names by a relative path."""
    files: dict[PurePosixPath, Path] = {}
    folder = path.parent
    source = folder / Path(study.corpus.path or folder).expanduser()
    if study.corpus.path and source.exists() and not Path(study.corpus.path).expanduser().is_absolute():
        for one in _below(source, whole=True):
            files[BESIDE / _inside(one, folder, "corpus.path")] = one
            if source.is_dir():  # a link in it may lead to what lies beside the study, which nobody meant to send
                inside(source, one, "corpus.path")
    tokenizer = tokenizer_file(study.tokenizer)  # relative to where the command is given, not to the file
    if tokenizer.is_file() and not tokenizer.is_absolute():
        beside = [tokenizer.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        for one in (tokenizer, *(one for one in beside if one.is_file())):
            files[PurePosixPath(_inside(one, Path.cwd(), "tokenizer"))] = one
    return files


def _inside(path: Path, folder: Path, field: str) -> str:
    """The path relative to a folder. InputError where it leads out of it, by its name or by a link."""
    found = os.path.relpath(path, folder)
    if found.startswith(".."):
        raise InputError(
            f"{field}: {found} lies outside {folder}, so it does not go to the cluster with the study. Put it beside "
            "the study, or give the absolute path that the cluster's nodes see."
        )
    inside(folder, path, field)
    return PurePosixPath(*Path(found).parts).as_posix()


def _below(folder: Path, *, whole: bool = False) -> Iterator[Path]:
    """The files below a folder, or the file itself, and no more than may be sent: all that are not hidden, or without
    what is seldom meant."""
    if folder.is_file():
        yield folder
        return
    count = 0
    for root, names, files in os.walk(folder):
        here = Path(root)
        names[:] = sorted(
            name for name in names if not (name.startswith(".") or (not whole and _is_left_out(here / name)))
        )
        for name in sorted(files):
            path = here / name
            if name.startswith(".") or (not whole and name.endswith(SUFFIXES_LEFT_OUT)) or not path.is_file():
                continue
            yield path
            count += 1
            if count >= MOST_FILES:
                return


def _is_left_out(folder: Path) -> bool:
    name = folder.name
    if name in LEFT_OUT or name.endswith(".egg-info"):
        return True
    if (folder / "store.json").exists() or (folder / "pyvenv.cfg").exists():
        return True
    return folder.resolve() in {CODE / name for name in PACKAGES}  # a study at the repository's top


def _too_large(package: Package, total: int, folder: Path | None) -> str:
    largest = ", ".join(f"{place} ({size / 1e6:,.1f} MB)" for place, size in list(package.sizes.items())[:5])
    remedy = "Keep data on storage that the cluster's nodes share, and name it in the study by its absolute path there."
    if folder is not None:
        remedy = f"With --allow-code all of {folder} goes: put the study and its code into a folder alone. {remedy}"
    return (
        f"what would go to the cluster has {total / 1e6:,.0f} MB in {len(package.files):,} files; at most "
        f"{LARGEST_BYTES / 1e6:.0f} MB and {MOST_FILES:,} files are sent. The largest: {largest}. {remedy}"
    )
