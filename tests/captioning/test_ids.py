"""Digests of ids: repeated ones are counted, in eight bytes an id."""

from __future__ import annotations

import tracemalloc

from clsp_fast.captioning.ids import Digests, digest


def test_repeated_ids_are_counted() -> None:
    digests = Digests()
    assert digests.repeated() == 0
    assert digests.repeated_values() == set()
    for name in ("a", "b", "a", "\udce9", "a", "\udce9"):
        digests.add(name)
    assert digests.repeated() == 3
    assert digests.repeated_values() == {digest("a"), digest("\udce9")}
    values = digests.sorted_values().tolist()
    assert values == sorted(digest(name) for name in ("a", "a", "a", "b", "\udce9", "\udce9"))
    assert 0 <= values[0] < values[-1] < 2**63


def test_an_id_takes_eight_bytes() -> None:
    digests = Digests()
    tracemalloc.start()
    for i in range(20_000):
        digests.add(f"clip-{i}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 160_000 <= held < 250_000
    assert digests.repeated() == 0
