"""A user's own code: functions of files beside the study, run only where the user allowed it.

The bytes that are hashed are the bytes that run: no import system, so no stale bytecode. The hash goes into the
identity of cells, so that an edited file is never taken for the one that trained them.
"""

import hashlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sweeps.errors import InputError, nearest
from sweeps.paths import inside


def load_function(what: str, declared: str, base_dir: Path | None) -> tuple[Callable[..., Any], str]:
    """(function, hash of its file) of a family or trainer (`what`) declared as `my_file.py:function`.

    The file lies in `base_dir` or below it; None allows no such code. Raises InputError where it may not run, lies
    elsewhere, is missing, fails or has no such function.
    """
    path_text, colon, name = declared.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        raise InputError(f'{what}: found "{declared}"; write my_file.py:function.')
    if base_dir is None:
        raise InputError(
            f'{what} "{declared}" runs code from a file. Read {path_text}, then allow it with --allow-code '
            "(allow_code=True in Python)."
        )
    path = inside(base_dir, path_text, f'{what} "{declared}"')
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f'{what} "{declared}": cannot read {path} ({error.strerror}). Check the path.') from error
    digest = hashlib.sha256(source).hexdigest()[:12]
    module = _run(what, path, source, digest)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise InputError(
            f"{path} has no function {name}{nearest(name, there)}. Its functions: {', '.join(there) or 'none'}."
        )
    return function, digest


def trainer_identity(declared: str, base_dir: Path | None) -> str:
    """What a cell's identity says of its trainer: `my_file.py:train@<hash of the file>`; an edited file is another."""
    return f"{declared}@{load_function('trainer', declared, base_dir)[1]}"


@lru_cache(maxsize=32)
def _run(what: str, path: Path, source: bytes, digest: str) -> types.ModuleType:
    module = types.ModuleType(f"escala_{what}_{digest}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:  # one that ends the process would end it without a word
        raise InputError(f'{what} "{path}" fails with {type(error).__name__}: {error}. Mend it.') from error
    return module
