"""Seeded schedules of kills, freezes and terminations: each study ends as if nothing had happened."""

import os
from pathlib import Path

import pytest
from chaos.run import Reference, make_reference, run_schedule, table
from chaos.schedule import COUNT, FAULTS, draw

SEEDS = int(os.environ.get("ESCALA_CHAOS_SEEDS", "3"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_study_under_chaos_ends_as_if_nothing_had_happened(seed: int, reference: Reference, tmp_path: Path) -> None:
    verdict = run_schedule(seed, tmp_path, reference)
    print("\n".join(verdict.log))
    print(table([verdict]))
    assert not verdict.problems, "\n".join([*verdict.problems, *verdict.log])


def test_a_schedule_follows_from_its_seed_and_thirty_try_every_fault() -> None:
    assert draw(7, 240) == draw(7, 240)
    assert all(len(draw(seed, 240)) == COUNT for seed in range(30))
    assert {fault.name for seed in range(30) for fault in draw(seed, 240)} == set(FAULTS)
