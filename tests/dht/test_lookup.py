"""A lookup by itself: paths, credit, IP groups, hedging, holders. No core, no network."""

from __future__ import annotations

import pytest
from dht_samples import keypair

from p2pnet.dht.keyspace import peer_position, position, record_key
from p2pnet.dht.lookup import _CREDIT, ALPHA, GROUP_NEAREST_MAX, PATHS, Lookup
from p2pnet.net.network import PeerInfo

KEY = record_key("/p2pnet/a key")
US = keypair(-1).peer_id


def peers(count: int, start: int = 0) -> list[str]:
    """Peer ids, nearest to the key first."""
    ids = [keypair(n).peer_id for n in range(start, start + count)]
    return sorted(ids, key=lambda peer_id: peer_position(peer_id) ^ position(KEY))


def infos(ids: list[str], group: str = "") -> list[PeerInfo]:
    """Each at an address that says which group it is of: its own where none is given."""
    return [PeerInfo(peer_id, (f"/dns4/{group or peer_id}/tcp/1",)) for peer_id in ids]


def group_of(peer_id: str, addr: str) -> str:
    """What the address says."""
    return addr.split("/")[2] if addr else peer_id


def lookup(*, holders: int = 0, narrow: int = 0, shy: frozenset[str] = frozenset()) -> Lookup:
    """One that has heard of nobody."""
    return Lookup(
        US,
        KEY,
        width=20,
        group_of=group_of,
        holders=holders,
        narrow=narrow,
        shy=lambda peer_id: peer_id in shy,
    )


def answer(search: Lookup, peer_id: str, *, holder: bool = True, group: str = "") -> None:
    """It has answered, from where its address says."""
    search.answered(peer_id, holder=holder, addr=f"/dns4/{group or peer_id}/tcp/1")


def asked(search: Lookup) -> list[str]:
    """Whom it wants to ask now."""
    return [peer.peer_id for peer in search.next()]


def test_the_nearest_are_asked_first_and_so_many_at_once() -> None:
    search, known = lookup(), peers(30)
    search.begin(infos(known))
    assert asked(search) == known[:ALPHA]
    assert asked(search) == []
    answer(search, known[0])
    assert asked(search) == [known[ALPHA]]


def test_it_ends_when_the_nearest_have_answered() -> None:
    search, known = lookup(), peers(30)
    search.begin(infos(known))
    requests = 0
    while waiting := asked(search):
        for peer_id in waiting:
            answer(search, peer_id)
            requests += 1
    assert search.done
    assert [peer.peer_id for peer in search.nearest()] == known[:20]
    assert requests == search.requests == 20
    assert search.hops == 1


def test_what_one_path_is_told_does_not_stop_the_others() -> None:
    """One liar names many peers nearer than all others: the other paths go on."""
    search, known = lookup(), peers(100)
    crowd, honest = known[:20], known[40 : 40 + PATHS]
    search.begin(infos(honest))
    first = asked(search)
    answer(search, first[0])
    search.heard(first[0], infos(crowd))
    for peer_id in first[1:]:
        answer(search, peer_id)
    more = asked(search)
    assert set(honest[ALPHA:PATHS]) <= set(more)


def test_who_names_peers_that_fail_is_believed_no_more() -> None:
    search, known = lookup(), peers(60)
    liar, honest, invented = known[40], known[41:60], known[:20]
    search.begin(infos([liar, *honest]))
    (*_,) = asked(search)
    answer(search, liar)
    search.heard(liar, infos(invented))
    failed = 0
    while waiting := asked(search):
        for peer_id in waiting:
            if peer_id in invented:
                search.failed(peer_id)
                failed += 1
            else:
                answer(search, peer_id)
        for peer_id in honest[:4]:
            if peer_id not in waiting and not failed:
                answer(search, peer_id)
    assert _CREDIT < failed <= _CREDIT + ALPHA
    assert search.done


def test_a_few_dead_do_not_cost_an_honest_peer_its_credit() -> None:
    search, known = lookup(), peers(60)
    referrer, named = known[50], known[:20]
    search.begin(infos([referrer]))
    assert asked(search) == [referrer]
    answer(search, referrer)
    search.heard(referrer, infos(named))
    while waiting := asked(search):
        for peer_id in waiting:
            if peer_id in named[:5]:
                search.failed(peer_id)
            else:
                answer(search, peer_id)
    assert [peer.peer_id for peer in search.nearest()] == [*named[5:], referrer]


def test_of_one_ip_group_only_a_few_count() -> None:
    search, known = lookup(), peers(60)
    crowd, others = known[:30], known[30:]
    search.begin(infos(crowd, group="crowd") + infos(others))
    while waiting := asked(search):
        for peer_id in waiting:
            answer(search, peer_id, group="crowd" if peer_id in crowd else "")
    found = [peer.peer_id for peer in search.nearest()]
    assert sum(peer_id in crowd for peer_id in found) == GROUP_NEAREST_MAX
    assert [peer.peer_id for peer in search.holders()][:2] == [crowd[0], others[0]]


def test_where_there_is_one_ip_group_all_of_it_counts() -> None:
    search, known = lookup(holders=8), peers(30)
    search.begin(infos(known, group="laboratory"))
    while waiting := asked(search):
        for peer_id in waiting:
            answer(search, peer_id, group="laboratory")
    assert [peer.peer_id for peer in search.holders()][:8] == known[:8]


def test_the_group_is_that_of_where_a_peer_was_seen() -> None:
    search, known = lookup(), peers(60)
    search.begin(infos(known))  # each claims an address of its own
    while waiting := asked(search):
        for peer_id in waiting:
            addr = f"/dns4/{'crowd' if peer_id in known[:30] else peer_id}/tcp/1"
            search.answered(peer_id, holder=True, addr=addr)
    found = [peer.peer_id for peer in search.nearest()]
    assert sum(peer_id in known[:30] for peer_id in found) == GROUP_NEAREST_MAX


def test_a_slow_peer_is_hedged_and_an_overdue_one_not_waited_for() -> None:
    search, known = lookup(), peers(30)
    search.begin(infos(known))
    first = asked(search)
    search.slow(first[0])
    assert asked(search) == [known[ALPHA]]
    search.overdue(first[0])
    assert asked(search) == []  # it was made up for already
    while True:
        flying = [p for p in known if p != first[0] and p in search]
        for peer_id in flying:
            answer(search, peer_id)
        if not asked(search):
            break
    assert search.done
    assert first[0] not in [peer.peer_id for peer in search.nearest()]


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_narrow_search_asks_no_more_than_it_needs_until_it_is_widened(stopped: int) -> None:
    search, known = lookup(holders=8, narrow=3), peers(30)
    search.begin(infos(known))
    first = asked(search)
    assert first == known[:3]
    for peer_id in first[:stopped]:
        search.overdue(peer_id)
    more = asked(search)
    assert more == known[3 : 3 + stopped]
    for peer_id in (*first[stopped:], *more):
        answer(search, peer_id)
    assert asked(search) == []
    assert search.quorum(3, 8)
    search.widen()
    assert asked(search) != []


def test_who_stalls_is_asked_last() -> None:
    known = peers(10)
    search = lookup(shy=frozenset(known[:3]))
    search.begin(infos(known))
    asked_first: list[str] = []
    while len(asked_first) < len(known) - 3:
        waiting = asked(search)
        for peer_id in waiting:
            answer(search, peer_id)
        asked_first += waiting
    assert set(asked_first) == set(known[3:])
    assert set(asked(search)) == set(known[:3])  # nobody else is left


def test_stock_peers_do_not_count_as_holders() -> None:
    search, known = lookup(holders=3), peers(30)
    search.begin(infos(known))
    while waiting := asked(search):
        for peer_id in waiting:
            answer(search, peer_id, holder=peer_id not in known[:5])
    assert search.done
    assert [peer.peer_id for peer in search.holders()][:3] == known[5:8]
