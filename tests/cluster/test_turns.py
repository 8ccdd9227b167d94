"""Of studies that share a cluster, one with a higher priority goes first while it waits for room."""

from pathlib import Path

from cluster.claims import Claim
from cluster.turns import Turns
from sweeps.store import open_store


def test_a_living_driver_of_a_higher_priority_that_waits_on_the_same_cluster_goes_first(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    low = Turns(store, "low", 0, "head:6379", 0)
    assert low.before() is None
    with Claim(store, "high") as claim:
        high = Turns(store, "high", claim.number, "head:6379", 5)
        high.tell(False)
        assert low.before() is None, "it has all that it wants"
        high.tell(True)
        assert low.before() == "high (priority 5)"
        assert high.before() is None
        assert Turns(store, "equal", 0, "head:6379", 5).before() is None
        assert Turns(store, "elsewhere", 0, "other:6379", 0).before() is None
    assert low.before() is None, "its driver has ended"
