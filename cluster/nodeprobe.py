"""What each node of a joined cluster sees: the store, Escala's code, its packages, GPUs, disk and clock.

Guards against a worker that trains with other code, or writes to a folder that only looks like the store: a mount that
is missing on one node, and its cells fail there one after the other, or train where nobody finds them.

A probe is an actor that takes no CPU, so that a busy node answers too. Ray sends its code by value: it runs on a node
on which Escala is not installed, and says so.
"""

import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.nodes import LivingNode, Members
from sweeps.errors import InputError
from sweeps.records import disk_error

PROBE_SECONDS = 120.0
"""How long a node gets to start a process and to answer: the disk of a new one may be cold."""
CLOCK_CALLS = 3
UNSEEN = "not looked at yet"
"""Why no cell goes to a node that has just joined."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One node as it sees itself."""

    node: LivingNode
    host: str = ""
    python: str = ""
    versions: dict[str, str | None]
    code: str | None = None
    """A hash of the code that a worker there would import; None where there is none."""
    code_folder: str | None = None
    gpus: tuple[str, ...] = ()
    driver: str | None = None
    """The version of the GPUs' driver."""
    store: str = "same"
    """same, missing (no such folder), other (a folder without the driver's file), or why it cannot be written."""
    free_bytes: int | None = None
    """On the store's disk."""
    clock_seconds: float | None = None
    """How far its clock is ahead of this machine's."""
    clock_error: float = 0.0
    """At most so many seconds off."""
    silent: str | None = None
    """Why there is no report, if so."""


def make_probe() -> type:
    """The class of the actor. Made in a function, so that Ray sends its code by value and not by its name."""

    class Probe:
        def look(self, root: str | None, question: str, answer: str) -> dict[str, Any]:
            import glob
            import hashlib
            import importlib.util
            import os
            import platform
            import re
            import shutil
            import socket
            from importlib.metadata import PackageNotFoundError, version

            told: dict[str, Any] = {"host": socket.gethostname(), "python": platform.python_version(), "versions": {}}
            for name in ("ray", "torch", "transformers", "numpy"):
                try:
                    told["versions"][name] = version(name)
                except PackageNotFoundError:
                    told["versions"][name] = None
            found = importlib.util.find_spec("sweeps"), importlib.util.find_spec("cluster")
            folders = [spec.submodule_search_locations[0] for spec in found if spec and spec.submodule_search_locations]
            if len(folders) == 2:
                digest = hashlib.sha256()
                for folder in folders:
                    for path in sorted(glob.glob(os.path.join(folder, "*.py"))):
                        with open(path, "rb") as stream:
                            digest.update(os.path.basename(path).encode() + b"\0" + stream.read() + b"\0")
                told |= {"code": digest.hexdigest()[:12], "code_folder": os.path.dirname(folders[0])}
            names = []
            for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
                with open(path, errors="replace") as stream:
                    model = re.search(r"^Model:\s*(.+)$", stream.read(), re.MULTILINE)
                names += [model[1].strip()] if model else []
            told["gpus"] = tuple(names)
            if os.path.exists("/proc/driver/nvidia/version"):
                with open("/proc/driver/nvidia/version", errors="replace") as stream:
                    number = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", stream.read())
                told["driver"] = number[1] if number else None
            if root is None:
                return told
            told["store"] = self._store(root, question, answer)
            if os.path.isdir(root):
                told["free_bytes"] = shutil.disk_usage(root).free
            return told

        def _store(self, root: str, question: str, answer: str) -> str:
            import os
            import time

            if not os.path.isdir(root):
                return "missing"
            deadline = time.monotonic() + 5  # a network file system shows a new file after a moment
            while not os.path.exists(question):
                if time.monotonic() > deadline:
                    return "other"
                time.sleep(0.2)
            try:
                with open(question, "rb") as stream:
                    nonce = stream.read()
                with open(answer, "wb") as stream:
                    stream.write(nonce)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                return f"not writable there: {error.strerror}"
            return "same"

        def clock(self) -> float:
            import time

            return time.time()

    return Probe


class Probes:
    """The probes under way, from entering to leaving its `with` block. None outlives it, and no file does."""

    def __init__(self, ray: Any, root: Path | None) -> None:
        """`root` is the store's folder, which must exist; None leaves the store out."""
        self.ray, self.root = ray, root
        self._actors: dict[Any, tuple[LivingNode, Any]] = {}
        """By the call under way."""
        self._folder: Path | None = None
        self._nonce = secrets.token_hex(16)

    def begin(self, nodes: Iterable[LivingNode]) -> None:
        """Send a probe to each node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ask()
        for node in nodes:
            options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
            pinned = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
            actor = self.ray.remote(**options)(make_probe()).options(scheduling_strategy=pinned).remote()
            root = str(self.root) if self.root else None
            call = actor.look.remote(root, str(self._path("question")), str(self._path(node.id)))
            self._actors[call] = (node, actor)

    def done(self) -> bool:
        """Whether all have answered."""
        calls = list(self._actors)
        return len(self.ray.wait(calls, num_returns=len(calls), timeout=0)[0]) == len(calls)

    def reports(self, seconds: float = PROBE_SECONDS) -> list[Report]:
        """Those of all nodes that answer in so many seconds, and of each other one why not."""
        done, late = self.ray.wait(list(self._actors), num_returns=len(self._actors), timeout=seconds)
        found = [self._report(call) for call in done]
        for call in late:
            node, _ = self._actors[call]
            found.append(Report(node=node, versions={}, silent=f"no answer in {seconds:.0f} s"))
        return sorted(found, key=lambda report: report.node.id)

    def _report(self, call: Any) -> Report:
        node, actor = self._actors[call]
        try:
            told = self.ray.get(call)
            ahead, off = self._clock(actor)
        except self.ray.exceptions.RayError as error:
            return Report(node=node, versions={}, silent=str(error).strip().splitlines()[-1].rstrip("."))
        if told.get("store") == "same" and not self._came_back(node):
            told["store"] = "other"
        return Report(node=node, clock_seconds=ahead, clock_error=off, **told)

    def _clock(self, actor: Any) -> tuple[float, float]:
        """(seconds ahead, at most so many seconds off), by the fastest of a few calls."""
        best = (0.0, float("inf"))
        for _ in range(CLOCK_CALLS):
            before = time.time()
            there = self.ray.get(actor.clock.remote(), timeout=30)
            after = time.time()
            best = min(best, (there - (before + after) / 2, (after - before) / 2), key=lambda one: one[1])
        return best

    # --- the file ----------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return (self.root or Path()) / f".probe-{self._nonce}" / name

    def _ask(self) -> None:
        if self.root is None or self._folder is not None:
            return
        self._folder = self._path("question").parent
        try:
            self._folder.mkdir()
            self._path("question").write_text(self._nonce)
        except OSError as error:
            raise disk_error(self._path("question"), error) from error

    def _came_back(self, node: LivingNode) -> bool:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with suppress(OSError):
                if self._path(node.id).read_text() == self._nonce:
                    return True
            time.sleep(0.1)
        return False

    def __enter__(self) -> "Probes":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._actors.values():
            self.ray.kill(one[1])
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


# --- what a run makes of it --------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """What a report tells, of the driver's own process: versions, code, code_folder and so on."""
    probe: Any = make_probe()
    told: dict[str, Any] = probe().look(None, "", "")
    return told


def obstacle(report: Report, here: dict[str, Any], root: Path | None) -> str | None:
    """Why no cell may train on a node, with the remedy: one sentence or two; None where all is well."""
    node = report.node
    if report.silent:
        return f"node {node} gives no report ({report.silent}). Mend it, or take it out of the cluster."
    if report.store != "same":
        what = {
            "missing": f"the store {root} is not visible on node {node}: there is no such folder",
            "other": f"{root} on node {node} is another folder than the store here: what is written here is not there",
        }.get(report.store, f"the store {root} is {report.store} (node {node})")
        return f"{what}. Mount the shared file system there, at the same path, or name a store that every node sees."
    if report.code is None:
        return (
            f"Escala's code is not on node {node}. Install it there, have it on PYTHONPATH when Ray is started there, "
            "or use `escala submit`, which brings it along."
        )
    # One folder of one machine is the same code, though it was read while another node of it unpacked it anew.
    if report.code != here["code"] and (report.host, report.code_folder) != (here["host"], here["code_folder"]):
        return (
            f"node {node} has other code of Escala ({report.code} in {report.code_folder}) than this process "
            f"({here['code']} in {here['code_folder']}). Put the same on both, or use `escala submit`, which brings it "
            "along."
        )
    return None


def caution(report: Report, here: dict[str, Any]) -> str | None:
    """What is worth a word but stops nothing. Other versions of torch or transformers round otherwise: numbers agree
    within seed noise, each attempt records its versions, and so a mixed cluster is worth more than none."""
    there, ours = report.versions, here["versions"]
    words = [
        f"{name} {there[name]} on node {report.node}, {ours[name]} here"
        for name in ("torch", "transformers")
        if _public(there.get(name)) != _public(ours.get(name))
    ]
    return f"{'; '.join(words)}: losses may differ within seed noise; each attempt records its own." if words else None


def _public(version: str | None) -> str:
    """Without the build: 2.13.0 of 2.13.0+cu128."""
    return (version or "").partition("+")[0]


class Gate:
    """Which nodes may train: those that see the store and have the driver's code. The driver's own needs no look."""

    def __init__(self, members: Members, root: Path) -> None:
        self._members, self._root = members, root
        self._known = {members.here}
        self._here = this_process()
        self._under_way: tuple[Probes, float] | None = None
        self._silent: dict[str, float] = {}
        """Nodes that gave no report, and when each is looked at again: it may have started slowly."""

    def open(self) -> list[str]:
        """Look at all nodes that there are. Notes; InputError for the first that may not train.

        One that gives no report is left out: it may have died a moment ago, and others can do its work.
        """
        nodes = self._strangers()
        if not nodes:
            return []
        with Probes(self._members.ray, self._root) as probes:
            probes.begin(nodes)
            reports = probes.reports()
        said = set()
        for report in reports:
            found = obstacle(report, self._here, self._root)
            if found and not report.silent:
                raise InputError(found)
            if found:
                self._members.barred[report.node.id] = found
                self._silent[report.node.id] = time.monotonic() + PROBE_SECONDS
                said.add(f"no cell goes there: {found}")
            elif note := caution(report, self._here):
                said.add(note)
        return sorted(said)

    def look(self) -> list[str]:
        """Let in the nodes that have joined, once they were looked at; waits for none. What there is to say of them."""
        self._members.barred |= {node.id: UNSEEN for node in self._strangers()}  # also while others are looked at
        if self._under_way is None:
            if nodes := [node for node in self._members.living() if node.leaving == UNSEEN]:
                probes = Probes(self._members.ray, self._root)
                probes.begin(nodes)
                self._under_way = probes, time.monotonic() + PROBE_SECONDS
            return []
        probes, deadline = self._under_way
        if not probes.done() and time.monotonic() < deadline:
            return []
        with probes:
            reports = probes.reports(0.1)
        self._under_way, said = None, []
        for report in reports:
            told = self._silent.pop(report.node.id, None) is not None
            if found := obstacle(report, self._here, self._root):
                self._members.barred[report.node.id] = found
                if report.silent:
                    self._silent[report.node.id] = time.monotonic() + PROBE_SECONDS
                if not (report.silent and told):
                    said.append(f"no cell goes there: {found}")
            else:
                del self._members.barred[report.node.id]
                said += [note] if (note := caution(report, self._here)) else []
        return said

    def close(self) -> None:
        """End a look that is under way."""
        if self._under_way is not None:
            self._under_way[0].__exit__()
            self._under_way = None

    def _strangers(self) -> list[LivingNode]:
        """Usable nodes that could hold a worker and were not looked at before, or gave no report then."""
        for node_id, again in self._silent.items() if self._under_way is None else ():  # which may be at one of them
            if time.monotonic() >= again:
                self._members.barred.pop(node_id, None)
                self._known.discard(node_id)
        living = self._members.living()
        nodes = [node for node in living if node.leaving is None and node.id not in self._known and node.cpus >= 1]
        self._known |= {node.id for node in nodes}
        return nodes
