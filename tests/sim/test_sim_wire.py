"""What simulated connections, machines and links do, with a program that echoes."""

from __future__ import annotations

from typing import Any

import pytest

from p2pnet.errors import MalformedError
from p2pnet.sim.links import Links
from p2pnet.sim.machine import Clock, Machine
from p2pnet.sim.wire import SILENCE_S
from p2pnet.sim.world import World

ECHO = "/echo"
LINKS = {"near_s": 0.01, "far_s": 0.01, "jitter": 0.0}  # 10 ms each way, to everybody
TRIP_S = 0.02
DIAL_S = 6.5 * TRIP_S


class Echo:
    """Answers what it is asked, but for `bad`; remembers what happened."""

    protocol = ECHO

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.seen: list[tuple[float, str, Any]] = []
        self.boots = 0
        machine.install(self)

    def boot(self) -> None:
        self.boots += 1

    def connected(self, peer_id: str, addr: str) -> None:
        self.seen.append((self.machine.world.now, "connected", peer_id))

    def disconnected(self, peer_id: str) -> None:
        self.seen.append((self.machine.world.now, "disconnected", peer_id))

    def serve(self, peer_id: str, payload: Any) -> Any:
        if payload == b"bad":
            raise MalformedError("bad")
        self.seen.append((self.machine.world.now, "served", payload))
        return payload

    def size_bytes(self, payload: bytes) -> int:
        return len(payload)

    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.seen]


class Pair:
    """Two machines; `ask` notes (when, answer, whether there was one)."""

    def __init__(self, **links: float) -> None:
        self.world = World(1, Links(**(LINKS | links)))
        self.a, self.b = (Echo(self.world.machine()) for _ in range(2))
        self.answers: list[tuple[float, Any, bool]] = []

    def ask(self, payload: bytes = b"hello", timeout_s: float = 4.0, **kwargs: Any) -> None:
        self.world.wire.request(
            self.a.machine,
            self.b.machine.peer_id,
            ECHO,
            payload,
            timeout_s=timeout_s,
            done=lambda reply, who: self.answers.append((self.world.now, reply, who is not None)),
            **({"addrs": (self.b.machine.addr,)} | kwargs),
        )

    def run(self, seconds: float = 10.0) -> list[tuple[float, Any, bool]]:
        self.world.run_for(seconds)
        answers, self.answers = self.answers, []
        return answers


def test_a_request_dials_first_and_the_next_one_does_not() -> None:
    pair = Pair()
    pair.ask()
    assert pair.run() == [(pytest.approx(DIAL_S + TRIP_S), b"hello", True)]
    assert pair.a.kinds() == ["connected"]
    assert pair.b.kinds() == ["connected", "served"]
    start = pair.world.now
    pair.ask()
    assert pair.run() == [(pytest.approx(start + TRIP_S), b"hello", True)]
    assert pair.world.wire.bytes == {ECHO: 4 * len(b"hello")}


def test_a_refused_port_fails_after_one_trip_and_a_silent_one_at_the_timeout() -> None:
    pair = Pair()
    pair.b.machine.kill()
    pair.ask()
    assert pair.run() == [(pytest.approx(TRIP_S), None, False)]
    pair.b.machine.vanish()
    start = pair.world.now
    pair.ask()
    assert pair.run() == [(pytest.approx(start + 4.0, abs=0.01), None, False)]


def test_nobody_is_there_or_somebody_else() -> None:
    pair = Pair()
    pair.ask(addrs=("/ip4/9.9.9.9/tcp/1",))
    assert pair.run()[0][0] == pytest.approx(4.0, abs=0.01)
    other = Echo(pair.world.machine())
    start = pair.world.now
    pair.ask(addrs=(other.machine.addr,))
    assert pair.run() == [(pytest.approx(start + DIAL_S), None, False)]
    start = pair.world.now
    pair.ask(addrs=(other.machine.addr, pair.b.machine.addr))
    assert pair.run() == [(pytest.approx(start + 2 * DIAL_S + TRIP_S), b"hello", True)]
    pair.ask(addrs=())
    assert pair.run()[0][2], "where it was reached is remembered"


def test_what_no_honest_peer_asks_is_refused_and_the_connection_stays() -> None:
    pair = Pair()
    pair.ask(b"bad")
    assert pair.run() == [(pytest.approx(DIAL_S + TRIP_S), None, False)]
    assert pair.a.kinds() == ["connected"]


def test_a_killed_process_breaks_its_connections_and_what_is_under_way() -> None:
    pair = Pair()
    pair.ask()
    pair.run()
    killed_at = pair.world.now + 0.005
    pair.world.after(0.005, pair.b.machine.kill)
    pair.ask()
    answers = pair.run()
    assert answers == [(pytest.approx(killed_at + 0.01 + TRIP_S), None, False)]
    assert pair.a.seen[-1] == (
        pytest.approx(killed_at + 0.01),
        "disconnected",
        pair.b.machine.peer_id,
    )


def test_a_restarted_process_knows_no_connection_and_is_asked_again_over_a_new_one() -> None:
    pair = Pair()
    pair.ask()
    pair.run()
    pair.b.machine.vanish()
    pair.b.machine.restart()
    start = pair.world.now
    pair.ask()
    answers = pair.run()
    assert answers == [(pytest.approx(start + TRIP_S + DIAL_S + TRIP_S), b"hello", True)]
    assert pair.a.kinds() == ["connected", "disconnected", "connected"]
    assert pair.b.boots == 2


def test_a_silent_peer_is_disconnected_in_the_end() -> None:
    pair = Pair()
    pair.ask()
    pair.run(1.0)
    pair.b.machine.vanish()
    for _ in range(3):
        pair.ask(timeout_s=2.0)
        assert not pair.run(2.0)[0][2]
    assert pair.a.kinds() == ["connected", "disconnected"]
    assert pair.a.seen[-1][0] >= SILENCE_S


def test_what_comes_while_a_machine_is_paused_waits_in_order() -> None:
    pair = Pair()
    pair.ask()
    pair.run(1.0)
    pair.b.machine.pause()
    for payload in (b"1", b"2"):
        pair.ask(payload)
        pair.world.run_for(0.5)
    assert pair.b.kinds() == ["connected", "served"]
    pair.b.machine.resume()
    assert [payload for _, _, payload in pair.b.seen[2:]] == [b"1", b"2"]
    assert [answer for _, answer, _ in pair.run()] == [b"1", b"2"]


def test_a_process_that_ends_hears_nothing_of_what_it_asked() -> None:
    pair = Pair()
    pair.ask()
    pair.world.after(DIAL_S + 0.005, pair.a.machine.restart)
    assert pair.run() == []


@pytest.mark.parametrize("forth", [True, False], ids=["requests are lost", "answers are lost"])
def test_a_cut_in_one_direction_fails_at_the_timeout_and_can_be_mended(forth: bool) -> None:
    pair = Pair()
    pair.ask()
    pair.run(1.0)
    ends = (pair.a.machine, pair.b.machine)
    pair.world.links.cut(*(ends if forth else ends[::-1]))
    pair.ask()
    assert pair.run(5.0) == [(pytest.approx(5.0), None, False)]
    assert pair.b.kinds().count("served") == (1 if forth else 2)
    pair.world.links.mend(*ends)
    pair.ask()
    assert pair.run()[0][2]


def test_a_partition_separates_groups_and_heals() -> None:
    pair = Pair()
    pair.world.links.split([pair.a.machine], [pair.b.machine])
    pair.ask()
    assert not pair.run(5.0)[0][2]
    pair.world.links.heal()
    pair.ask()
    assert pair.run()[0][2]


def test_a_lost_syn_is_sent_again() -> None:
    pair = Pair()
    pair.world.links.cut(pair.a.machine, pair.b.machine)
    pair.world.after(0.5, pair.world.links.heal)
    pair.ask()
    assert pair.run() == [(pytest.approx(1.0 + DIAL_S + TRIP_S), b"hello", True)]


def test_loss_and_duplication_are_about_as_often_as_said() -> None:
    pair = Pair(loss=0.2, duplication=0.3)
    for _ in range(500):
        pair.ask(timeout_s=0.5)
        pair.world.run_for(1.0)
    good = sum(answered for _, _, answered in pair.answers)
    # Of a request and its answer each comes twice in 3 cases of 10.
    through = 0.7 * 0.8 + 0.3 * (1 - 0.2**2)
    assert good / 500 == pytest.approx(through * (0.7 * 0.8 + 0.3 * 0.96), abs=0.12)
    assert pair.b.kinds().count("served") / 500 == pytest.approx(1.3 * 0.8, abs=0.1)
    assert len(pair.answers) == 500, "each request ends once"


def test_reordering_lets_later_messages_overtake() -> None:
    pair = Pair()
    pair.ask()
    pair.run(3.0)
    pair.world.links.reordering = 0.5
    for number in range(50):
        pair.ask(b"%d" % number)
    pair.run()
    served = [payload for _, _, payload in pair.b.seen[2:]]
    assert sorted(served, key=int) == [b"%d" % n for n in range(50)] != served


def test_a_clock_drifts_and_is_wrong() -> None:
    world = World(1)
    machine = world.machine(clock=Clock(offset_s=-60.0, drift=0.02))
    right = world.machine()
    fired: list[float] = []
    machine.after(10.2, lambda: fired.append(world.now))
    world.run_for(100.0)
    assert fired == [pytest.approx(10.0)]
    assert machine.now == pytest.approx(102.0)
    assert machine.wall_ms - right.wall_ms == pytest.approx(2_000 - 60_000, abs=1)


def test_a_disk_outlives_a_restart_unless_it_is_lost() -> None:
    machine = World(1).machine()
    machine.disk["x"] = 1
    machine.restart(keep_disk=True)
    assert machine.disk == {"x": 1}
    machine.restart(keep_disk=False)
    assert machine.disk == {}
