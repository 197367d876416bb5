"""Who keeps a log: few, close to the network, alive, and those who may take it over."""

from __future__ import annotations

import pytest
from memory_wire import keypair_of

from p2pnet.log.keepers import KEEPERS, first_keepers, next_keepers

NETWORK = "0123456789abcdef" * 2
PEERS = [keypair_of(f"peer{n}").peer_id for n in range(12)]


@pytest.mark.parametrize("alive", range(1, 12))
def test_an_odd_number_and_always_the_same(alive: int) -> None:
    for chosen in (
        first_keepers("small", PEERS[:alive]),
        next_keepers(NETWORK, (), PEERS[:alive]),
    ):
        assert len(chosen) == min(KEEPERS, alive if alive % 2 else max(1, alive - 1))
        assert list(chosen) == sorted({*chosen})
    backwards = PEERS[:alive][::-1]
    assert first_keepers("small", backwards) == first_keepers("small", PEERS[:alive])


def test_the_living_stay_and_the_dead_are_replaced() -> None:
    before = next_keepers(NETWORK, (), PEERS[:7])
    assert next_keepers(NETWORK, before, PEERS) == before  # though closer ones have come
    dead = before[0]
    after = next_keepers(NETWORK, before, [peer for peer in PEERS if peer != dead])
    assert {*before} - {*after} == {dead}
    assert len(after) == KEEPERS


def test_who_sees_too_few_does_not_leave_the_log_to_one() -> None:
    before = next_keepers(NETWORK, (), PEERS[:7])
    for alive in (PEERS[:1], PEERS[:2]):
        after = next_keepers(NETWORK, before, alive)
        assert len(after) == 3
        assert {*after} & {*alive}
        assert {*after} <= {*before, *alive}
    assert len(next_keepers(NETWORK, before[:1], PEERS[:2])) == 1  # there were never more


def test_who_may_take_the_network_over_keeps_its_log() -> None:
    far = [peer for peer in PEERS if peer not in first_keepers("small", PEERS)][:2]
    assert {*far} <= {*first_keepers("small", PEERS, far)}
    before = next_keepers(NETWORK, (), PEERS)
    strangers = [peer for peer in PEERS if peer not in before][:2]
    assert {*strangers} <= {*next_keepers(NETWORK, before, PEERS, strangers)}
    alive = [peer for peer in PEERS if peer != strangers[0]]
    assert strangers[0] not in next_keepers(NETWORK, before, alive, strangers)
