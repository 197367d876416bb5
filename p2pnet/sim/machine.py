"""A simulated machine: its clock, whether it runs, its disk, and the programs on it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from p2pnet.keys import KeyPair

if TYPE_CHECKING:
    from p2pnet.sim.connections import Line
    from p2pnet.sim.world import World

# What a wall clock that is right shows when the virtual time is 0, in ms since 1970.
WALL_MS = 1_800_000_000_000
# What is sent to a paused machine waits in its kernel, which has room for so much.
HELD_MAX = 10_000


class Phase(Enum):
    """How a machine is."""

    UP = auto()
    PAUSED = auto()  # SIGSTOP, a suspended laptop, a starved one: late, not gone
    DOWN = auto()  # the process was killed: connections break, the port refuses
    VANISHED = auto()  # a pulled plug: silence


@dataclass(slots=True)
class Clock:
    """A machine's own clocks.

    `drift`: 0.02 gains 2 % (both clocks do); `offset_s`: by how much the wall clock is
    wrong. The monotonic clock counts sleep and pauses too, as CLOCK_BOOTTIME does.
    """

    offset_s: float = 0.0
    drift: float = 0.0

    def local(self, now: float) -> float:
        """What the monotonic clock shows."""
        return now * (1.0 + self.drift)

    def real(self, local: float) -> float:
        """When the monotonic clock shows that."""
        return local / (1.0 + self.drift)

    def wall_ms(self, now: float) -> int:
        """What the wall clock shows, in ms since 1970."""
        return WALL_MS + round((self.local(now) + self.offset_s) * 1000)


class Program(Protocol):
    """What runs on a machine and answers one protocol: one core with its shell."""

    protocol: str

    def boot(self) -> None:
        """The process starts; `machine.disk` holds what an earlier one left there."""
        ...

    def connected(self, peer_id: str, addr: str) -> None:
        """The first connection to a peer is up; `addr`: where it was seen."""
        ...

    def disconnected(self, peer_id: str) -> None:
        """The connection to a peer went."""
        ...

    def serve(self, peer_id: str, payload: Any) -> Any:
        """Answers a request (None: the protocol has no answer); a RemoteError refuses it."""
        ...

    def size_bytes(self, payload: Any) -> int:
        """What a message takes on the wire."""
        ...


def default_addr(number: int) -> str:
    """A public address, each in an IP group of its own."""
    return f"/ip4/{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}.1/tcp/4001"


class Machine:
    """One machine, and the process on it. Made by `World.machine`.

    Its identity lasts; everything else of the process ends with it, but for `disk`,
    on which a program keeps what it likes under a name of its own.
    """

    def __init__(self, world: World, number: int, clock: Clock, addr: str) -> None:
        self.world = world
        self.number = number
        self.key = KeyPair.from_seed((number + 1).to_bytes(32, "big"))
        self.peer_id = self.key.peer_id
        self.addr = addr
        self.clock = clock
        self.place = (0.0, 0.0)
        self.phase = Phase.UP
        self.boots = 1  # counts the processes that there were
        self.disk: dict[str, Any] = {}
        self.programs: dict[str, Program] = {}
        self.announces: tuple[str, ...] = ()  # further protocols that it says it speaks
        self.lines: dict[str, Line] = {}  # connections, by the peer's id
        self.remembered: dict[str, str] = {}  # where peers were reached
        self.sent_bytes = 0
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._overdue: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.on_boot: list[Callable[[], None]] = []  # called at each restart, last

    def __repr__(self) -> str:
        return f"machine {self.number} ({self.phase.name.lower()})"

    @property
    def now(self) -> float:
        """The monotonic clock, in seconds."""
        return self.clock.local(self.world.now)

    @property
    def wall_ms(self) -> int:
        """The wall clock."""
        return self.clock.wall_ms(self.world.now)

    @property
    def running(self) -> bool:
        """Up, and not paused."""
        return self.phase is Phase.UP

    @property
    def alive(self) -> bool:
        """Up or paused."""
        return self.phase is Phase.UP or self.phase is Phase.PAUSED

    def install(self, program: Program) -> None:
        """Starts a program, now and with every restart."""
        self.programs[program.protocol] = program
        if self.alive:
            program.boot()

    def speaks(self, protocol: str) -> bool:
        """What libp2p's identify would say."""
        return protocol in self.programs or protocol in self.announces

    # What happens here

    def does(self, boots: int, action: Callable[..., None], *arguments: Any) -> None:
        """Does something in the process number `boots`, later if that is paused.

        Nothing happens if that process is no more.
        """
        if self.phase is Phase.UP:
            if boots == self.boots:
                action(*arguments)
        elif self.phase is Phase.PAUSED and boots == self.boots and len(self._held) < HELD_MAX:
            self._held.append((action, arguments))

    def times_out(self, boots: int, action: Callable[..., None], *arguments: Any) -> None:
        """A deadline of a request passes; in a paused process, before anything else that waits.

        So it is in trio: what the kernel holds is read by a task that runs later than
        the one whose deadline is over.
        """
        if self.phase is Phase.PAUSED and boots == self.boots:
            self._overdue.append((action, arguments))
        else:
            self.does(boots, action, *arguments)

    def after(self, local_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Does something so many seconds of its own clock later, if the process lasts."""
        when = self.world.now + self.clock.real(local_s)
        self.world.at(when, self.does, self.boots, action, *arguments)

    # Faults

    def kill(self) -> None:
        """The process dies at once (kill -9): peers see their connections break."""
        if self.alive:
            self.world.wire.killed(self)
            self._end(Phase.DOWN)

    def vanish(self) -> None:
        """The machine is gone without a word."""
        if self.phase is not Phase.VANISHED:
            self._end(Phase.VANISHED)

    def pause(self) -> None:
        """The process stands still; what comes in waits."""
        if self.phase is Phase.UP:
            self.phase = Phase.PAUSED

    def resume(self) -> None:
        """It goes on, and finds what waited: its own deadlines first, then the rest."""
        if self.phase is Phase.PAUSED:
            self.phase = Phase.UP
            held = self._overdue + self._held
            self._overdue, self._held = [], []
            boots = self.boots
            for action, arguments in held:
                self.does(boots, action, *arguments)

    def restart(self, *, keep_disk: bool = True) -> None:
        """A new process; the old one, if there still is one, is killed first."""
        self.kill()
        self.phase = Phase.UP
        self.boots += 1
        if not keep_disk:
            self.disk.clear()
        for program in self.programs.values():
            program.boot()
        for action in self.on_boot:
            action()

    def starve(self, *, off_s: float, on_s: float, times: int) -> None:
        """Again and again the process gets no time for a while."""
        for turn in range(times):
            start_s = turn * (off_s + on_s)
            self.world.after(start_s, self.pause)
            self.world.after(start_s + off_s, self.resume)

    def _end(self, phase: Phase) -> None:
        self.phase = phase
        self._held.clear()
        self._overdue.clear()
        self.lines.clear()
        self.remembered.clear()
