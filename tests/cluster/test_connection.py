"""An address at which no cluster answers is said at once, in one sentence."""

import pytest
from faultproxy import free_port

from cluster import connection
from sweeps.errors import InputError


def test_a_cluster_that_has_ended_is_said_at_once_where_ray_still_has_a_note_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    port = free_port()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # others' on this machine
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda _: f"localhost:{port}")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would retry for a minute"))
    with pytest.raises(InputError, match=rf":{port}, which is 'auto' here: .*Connection refused.*correct --address"):
        connection._start("auto", None)
