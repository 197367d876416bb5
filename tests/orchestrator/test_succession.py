"""Who takes a network over, and when: by rank, once the lease is over, and not sooner."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from p2pnet.core import Tick
from p2pnet.dht.keyspace import network_key, peer_position, position
from p2pnet.keys import KeyPair
from p2pnet.orchestrator.succession import (
    ASK_EVERY_S,
    DENIED_MAX,
    SILENT_MAX,
    STRANGER_S,
    TRY_S,
    TURN_S,
    Alive,
    AskLease,
    Effect,
    Event,
    Failed,
    Forget,
    Known,
    LeaseDenied,
    LeaseHeld,
    LeaseSilent,
    Succession,
    TakeOver,
    candidates_of,
)

NETWORK = "0123456789abcdef" * 2
PEERS = sorted(
    (KeyPair.from_seed(bytes([n]) * 32).peer_id for n in range(1, 8)),
    key=lambda peer: peer_position(peer) ^ position(network_key(NETWORK)),
)
OLD, HEIRS = PEERS[-1], PEERS[:-1]


class One:
    """The core of one peer, ticked as it wants to be."""

    def __init__(self, me: str, candidates: Sequence[str] = tuple(sorted(PEERS))) -> None:
        self.core = Succession(me)
        self.now = 0.0
        self.done: list[tuple[float, Effect]] = []
        self.feed(Alive(tuple(PEERS)))
        self.feed(Known(NETWORK, 3, OLD, tuple(candidates)))

    def feed(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        self.core.check()
        self.done += [(self.now, effect) for effect in effects]
        return effects

    def run(self, until: float, answer: type | None = LeaseHeld) -> None:
        """Lets time pass; asks are answered at once, or never."""
        while (due := self.core.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            for effect in self.feed(Tick()):
                if isinstance(effect, AskLease) and answer is not None:
                    more = (3,) if answer is LeaseHeld else ()
                    self.feed(answer(effect.network_id, effect.peer_id, *more))
        self.now = until

    def taken_at(self) -> list[float]:
        return [at for at, effect in self.done if isinstance(effect, TakeOver)]


def test_a_living_orchestrator_that_answers_is_left_alone() -> None:
    for me in HEIRS:
        one = One(me)
        one.run(3600.0)
        assert one.taken_at() == []
        asks = sum(isinstance(effect, AskLease) for _, effect in one.done)
        assert asks == (pytest.approx(1800, abs=2) if me in HEIRS[:3] else 0)


@pytest.mark.parametrize("rank", range(len(HEIRS)))
def test_the_heirs_act_in_the_order_of_their_distance(rank: int) -> None:
    one = One(HEIRS[rank])
    one.run(10.0)
    one.feed(Alive(tuple(HEIRS)))
    one.run(10.0 + TURN_S * len(HEIRS))
    assert one.taken_at() == [pytest.approx(10.0 + TURN_S * rank)]
    [taken] = [effect for _, effect in one.done if isinstance(effect, TakeOver)]
    assert (taken.network_id, taken.epoch) == (NETWORK, 3)
    assert "is gone" in taken.reason


def test_dead_heirs_are_not_waited_for() -> None:
    one = One(HEIRS[3])
    one.feed(Alive((HEIRS[3], HEIRS[5])))
    assert one.taken_at() == [0.0]


@pytest.mark.parametrize(
    ("answer", "times"), [(LeaseSilent, SILENT_MAX), (LeaseDenied, DENIED_MAX)]
)
def test_who_lives_and_does_not_hold_the_lease_is_succeeded(answer: type, times: int) -> None:
    one = One(HEIRS[0])
    one.run(60.0, answer)
    assert one.taken_at()[0] == pytest.approx(ASK_EVERY_S * times)


def test_one_answer_makes_up_for_silence() -> None:
    one = One(HEIRS[0])
    for turn in range(50):
        answer = LeaseHeld if turn % SILENT_MAX == SILENT_MAX - 1 else LeaseSilent
        one.run(ASK_EVERY_S * (turn + 1), answer)
    assert one.taken_at() == []


def test_a_newer_claim_ends_the_wait() -> None:
    one = One(HEIRS[2])
    one.feed(Alive(tuple(HEIRS)))
    one.feed(Known(NETWORK, 4, HEIRS[0], tuple(sorted(HEIRS))))
    one.run(600.0)
    assert one.taken_at() == []
    one.feed(Known(NETWORK, 3, OLD, tuple(PEERS)))  # an older one changes nothing
    one.run(1200.0)
    assert one.taken_at() == []


def test_an_orchestrator_that_comes_back_in_time_keeps_its_network() -> None:
    one = One(HEIRS[2])
    one.feed(Alive(tuple(HEIRS)))
    one.run(TURN_S)
    one.feed(Alive(tuple(PEERS)))
    one.run(600.0)
    assert one.taken_at() == []


def test_whom_this_process_has_not_met_is_given_time() -> None:
    core = Succession(HEIRS[0])
    core.handle(Known(NETWORK, 3, OLD, tuple(PEERS)), 0.0)
    assert core.deadline() == STRANGER_S
    assert core.handle(Tick(), STRANGER_S - 0.1) == []
    core.handle(Alive(tuple(PEERS)), STRANGER_S - 0.1)
    assert not any(isinstance(it, TakeOver) for it in core.handle(Tick(), STRANGER_S))
    alone = Succession(HEIRS[0])
    alone.handle(Known(NETWORK, 3, OLD, tuple(PEERS)), 0.0)
    assert any(isinstance(it, TakeOver) for it in alone.handle(Tick(), STRANGER_S))


def test_a_try_that_came_to_nothing_is_repeated_later() -> None:
    one = One(HEIRS[0])
    one.feed(Alive(tuple(HEIRS)))
    one.feed(Failed(NETWORK))
    one.run(5.0)
    assert len(one.taken_at()) == 2  # once more after its turn
    one.run(5.0 + 2 * TRY_S)
    assert len(one.taken_at()) == 4


def test_a_closed_network_is_nobodys() -> None:
    one = One(HEIRS[0])
    one.feed(Forget(NETWORK))
    one.feed(Alive(tuple(HEIRS)))
    one.run(600.0)
    assert one.taken_at() == []


def test_ourselves_after_a_restart() -> None:
    one = One(OLD)
    one.run(60.0, LeaseDenied)
    assert one.taken_at()  # the process looks after nothing, and the log says that we do


def test_who_may_succeed() -> None:
    assert candidates_of(["c", "a"], ["b", "a"], None) == ("a", "b", "c")
    assert candidates_of(["c", "a"], ["b"], ["b", "x"]) == ("b",)


@pytest.mark.parametrize("seed", range(20))
def test_with_equal_views_one_acts_and_its_claim_stops_the_others(seed: int) -> None:
    rng = random.Random(seed)
    alive = tuple(sorted(rng.sample(HEIRS, rng.randint(1, len(HEIRS)))))
    cores = {peer: One(peer) for peer in alive}
    took: dict[str, None] = {}
    for one in cores.values():
        one.feed(Alive(alive))
    for tenth in range(200):
        for peer, one in cores.items():
            one.run(tenth / 10)
            if one.taken_at() and peer not in took:
                took[peer] = None
                for other in cores.values():
                    other.feed(Known(NETWORK, 4, peer, alive))
    assert list(took) == [min(alive, key=PEERS.index)]
    assert len(cores[next(iter(took))].taken_at()) == 1
