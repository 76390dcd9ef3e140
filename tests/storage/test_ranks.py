"""How the processes of a run find each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from clsp_fast.storage import ranks


def test_restarted_processes_meet_in_a_fresh_part_of_the_store() -> None:
    shared, groups = dist.HashStore(), []
    shared.set("clsp_fast/1", "a name that a killed process left")
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            joined = [pool.submit(ranks._fresh_store, shared, rank, 3) for rank in (1, 0, 2)]
            stores = [future.result(timeout=60) for future in joined]
        assert not stores[0].check(["address"])
        stores[0].set("address", str(len(groups)))
        assert {store.get("address") for store in stores} == {str(len(groups)).encode()}
        groups.append(stores)
