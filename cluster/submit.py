"""Submitting: a study goes to a cluster as a Ray job, whose driver is `escala run` there.

The job holds nothing that the store does not: whatever ends it, submitting the study again goes on. Guarded against:
two drivers of one study (a job's name is its study's with the next number, and Ray gives a name away once), and
secrets in a job, where the Jobs API shows them: a password in a URL or a variable that is named like one is refused.
"""

import re
import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.control import person
from cluster.jobs import STOP_SECONDS, Dashboard, Job, answering, head_cpus, list_jobs
from cluster.package import CODE, Package, make_package
from cluster.planning import read_study
from sweeps import sources
from sweeps.errors import InputError
from sweeps.fitted import fitted_studies
from sweeps.grids import Plan
from sweeps.redaction import SECRET_NAMES, redact
from sweeps.store import open_store, study_names
from sweeps.study import Study
from sweeps.studyfile import find_study_file, load_study

DRIVER_CPUS = 1
"""What the driver holds of the head. Not memory: Ray only counts it, and the workers, which need most, hold none."""
ON_THE_HEAD = {"node:__internal_head__": 0.001}
"""Ray's mark of the head. A job that asks for CPUs alone goes wherever they are free, also to a spot machine, and the
driver goes with it."""
PLANNED_HERE_BYTES = 100 * 1000**2
"""A larger corpus is tokenised on the cluster alone, and the cells are planned there."""
NAMES_TRIED = 5
"""Jobs of other people may take the next number first, so often."""
READY_SECONDS = 60.0
"""How long a cluster that was just started may take until it accepts jobs."""
NOT_READY = "No available agent"
"""Ray's words while a head's processes are still starting."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Submission:
    """All that is sent."""

    study: str
    store: str
    entrypoint: str
    package: Package
    environment: dict[str, str]
    plan: Plan | None
    """As planned here; None where only the cluster can."""
    unplanned: str
    """Why it was not planned here."""

    def to_json(self) -> dict[str, Any]:
        """What `--dry-run` shows: names of variables without their values."""
        sizes = self.package.sizes
        return {
            "study": self.study,
            "store": self.store,
            "cells": len(self.plan.cells) if self.plan else None,
            "entrypoint": self.entrypoint,
            "resources": {"CPU": DRIVER_CPUS, **ON_THE_HEAD},
            "environment": sorted(self.environment),
            "bytes": sum(sizes.values()),
            "files": sizes,
        }


def prepare(
    study: str,
    store: Path,
    *,
    tracking_uri: str | None,
    options: Sequence[str],
    variables: Sequence[str],
    environment: dict[str, str],
    allow_code: bool,
    accept_corpus: bool,
    refit: bool,
    touch: bool,
) -> Submission:
    """Check a study here and put together what goes to the cluster. InputError for all that `plan` refuses, a store
    that the cluster would not find, variables that are named like secrets, and too many bytes.

    `options` go to `escala run` as they are; `variables` are names of `environment` to pass on. Without `touch` a store
    that is visible here is only read.
    """
    path = find_study_file(study)
    declared = load_study(path)
    if not store.is_absolute():
        raise InputError(
            f"--store: found {str(store)!r}, which on the cluster is in the job's own folder and goes with it. Give "
            "the absolute path of a folder that the cluster's nodes share, as they see it: --store /shared/escala."
        )
    passed = _passed(variables, environment)
    package = make_package(path, declared, allow_code=allow_code)
    plan, unplanned = _plan_here(study, path, declared, store, allow_code, accept_corpus, refit, touch)
    words = ["run", package.study, "--address", "auto", "--store", str(store), *options]
    words += ["--tracking-uri", tracking_uri] if tracking_uri else []
    # exec: the shell around the driver would take the signal that stops it. Python is the cluster's.
    entrypoint = "exec python escala.py " + shlex.join(words)
    return Submission(declared.name, str(store), entrypoint, package, passed, plan, unplanned)


def _passed(variables: Sequence[str], environment: dict[str, str]) -> dict[str, str]:
    """The variables that go along, with their values."""
    for name in variables:
        if not VARIABLE.fullmatch(name):
            raise InputError(f"--env: found {name!r}; give the name of a variable alone, its value is taken from here.")
        if SECRET_NAMES.search(name.upper()):
            raise InputError(
                f"--env: {name} is named like a secret, and the Jobs API shows a job's variables to everyone who may "
                "ask. Set it on the cluster's nodes instead (a Kubernetes secret, a file that only they read)."
            )
        if name not in environment:
            raise InputError(f"--env: {name} is not set here, so it has no value to pass on.")
        if redact(environment[name]) != environment[name]:
            raise InputError(
                f"--env: {name} holds what looks like a password or a token, and the Jobs API shows a job's variables "
                "to everyone who may ask. Set it on the cluster's nodes instead, or pass it on without."
            )
    return {name: environment[name] for name in variables}


def _plan_here(
    study: str,
    path: Path,
    declared: Study,
    store: Path,
    allow_code: bool,
    accept_corpus: bool,
    refit: bool,
    touch: bool,
) -> tuple[Plan | None, str]:
    """The plan as this machine sees it, so that faults are known before anything is sent; or why there is none.

    In the cluster's store where that is visible here, else in one that is thrown away.
    """
    visible = (store / "store.json").is_file()
    if visible and (touch or declared.name in study_names(open_store(store, create=False))):
        return read_study(study, store, allow_code, accept_corpus, create=False, refit=refit)[1], ""
    if any(fitted_studies(declared.model_dump())):
        return None, "it takes values from fits, which are in the cluster's store"
    source = sources.make_source(
        declared.corpus.source, declared.corpus.path, declared.corpus.options, base_dir=path.resolve().parent
    )
    if not sources.is_here(source):
        return None, "its corpus is not on this machine"
    if source.path and _bytes(Path(source.path)) > PLANNED_HERE_BYTES:
        return None, "its corpus is too large to be read for it"
    with tempfile.TemporaryDirectory(prefix="escala-plan-") as folder:
        return read_study(study, Path(folder) / "store", allow_code, accept_corpus)[1], ""


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    total = 0
    for one in files:
        total += one.stat().st_size
        if total > PLANNED_HERE_BYTES:
            break
    return total


def send(dashboard: Dashboard, submission: Submission) -> tuple[Job, bool]:
    """Send a job, unless one of the study lives already: (the job, whether it is new). InputError where the head has no
    CPU for its driver: Ray would look for one for a quarter of an hour."""
    check_head(dashboard)
    # Ray's `RAY_JOB_STOP_WAIT_TIME_S` is read where the driver runs.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **submission.environment}
    metadata = {
        "escala.study": submission.study,
        "escala.store": submission.store,
        "escala.person": person(),
        "escala.commit": _commit(),
        "escala.package": submission.package.digest,
        "escala.sent": secrets.token_hex(8),
    }
    with tempfile.TemporaryDirectory(prefix="escala-package-") as folder:
        submission.package.write(Path(folder))
        for _ in range(NAMES_TRIED):
            jobs = list_jobs(dashboard)
            if lives := [job for job in jobs if job.lives and _same(job, submission)]:
                return lives[-1], False
            numbers = [_number(job) for job in jobs if job.study == submission.study]
            job_id = f"escala-{submission.study}-{1 + max(numbers, default=0)}"
            try:
                _submit(
                    dashboard,
                    entrypoint=submission.entrypoint,
                    submission_id=job_id,
                    entrypoint_num_cpus=DRIVER_CPUS,
                    entrypoint_resources=ON_THE_HEAD,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata=metadata,
                )
            except InputError:
                there = [job for job in list_jobs(dashboard) if job.id == job_id]
                if not there:
                    raise
                if _sent(dashboard, job_id) == metadata["escala.sent"]:  # it is there, and the reply was lost
                    return there[0], True
                continue  # another was quicker, perhaps with the same study and store
            return next(job for job in list_jobs(dashboard) if job.id == job_id), True
    raise InputError(f"others submit the study {submission.study} to {dashboard.address} all the time. Ask them.")


def check_head(dashboard: Dashboard) -> None:
    """InputError where the cluster's head can never hold a driver."""
    cpus = head_cpus(dashboard)
    if cpus is not None and cpus < DRIVER_CPUS:
        raise InputError(
            f"the head of {dashboard.address} has {cpus:g} CPUs, and a study's driver needs {DRIVER_CPUS} there, where "
            "no spot machine can be taken away under it. Start the head with room for drivers: ray start --head "
            "--num-cpus=2 (in a launcher's file: resources of the head, CPU: 2)."
        )


def _submit(dashboard: Dashboard, **job: Any) -> None:
    """Send it; to a cluster that was started a moment ago again and again, until it takes jobs."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with answering(dashboard.address):
                dashboard.client.submit_job(**job)
            return
        except InputError as error:
            if NOT_READY not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def _sent(dashboard: Dashboard, job_id: str) -> str | None:
    """The mark that whoever sent a job gave it."""
    with answering(dashboard.address):
        found: str | None = (dashboard.client.get_job_info(job_id).metadata or {}).get("escala.sent")
    return found


def _same(job: Job, submission: Submission) -> bool:
    return job.study == submission.study and PurePosixPath(job.store) == PurePosixPath(submission.store)


def _number(job: Job) -> int:
    found = re.search(r"-(\d+)$", job.id)
    return int(found[1]) if found else 0


def _commit() -> str:
    """The commit of Escala's code, marked where it was edited; empty where it is no repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=CODE,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
