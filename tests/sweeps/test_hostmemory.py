"""Free memory: what the host has, within the limits of the container or job that a process runs in."""

from pathlib import Path

import psutil

from sweeps.hostmemory import host_bytes_free


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_the_narrowest_group_above_a_process_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("0::/job/step\n")
    stat = "anon 5\ninactive_file 300"
    group(tmp_path / "mount/job", {"memory.max": 1000, "memory.current": 600, "memory.stat": stat})
    group(tmp_path / "mount/job/step", {"memory.max": "max", "memory.current": 500, "memory.stat": stat})
    assert host_bytes_free(tmp_path / "groups", tmp_path / "mount") == 700


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    of_job = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 400, "memory.stat": "total_inactive_file 0"}
    group(tmp_path / "mount/memory/job", of_job)
    assert host_bytes_free(tmp_path / "groups", tmp_path / "mount") == 600


def test_a_container_that_does_not_see_its_hosts_paths_is_held_to_its_own_root(tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("0::/kubepods/pod1/abc\n")
    group(tmp_path / "mount", {"memory.max": 1000, "memory.current": 1200, "memory.stat": "inactive_file 0"})
    assert host_bytes_free(tmp_path / "groups", tmp_path / "mount") == 0


def test_without_groups_it_is_what_the_host_has(tmp_path: Path) -> None:
    free, host = host_bytes_free(tmp_path / "none", tmp_path), psutil.virtual_memory()
    assert 0 < free <= host.total
    (tmp_path / "groups").write_text("0::/\n")
    assert 0 < host_bytes_free(tmp_path / "groups", tmp_path / "mount") <= host.total
