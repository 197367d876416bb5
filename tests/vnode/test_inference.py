"""Forward passes through several hosts: what torch says, or a clear no, and never a hang."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import Log
from hosting import ORDER, allocate, allocation, network_of, place, teach
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import plain, plain_output, small_graph, submit, train
from virtual_time import play

from p2pnet.client import inference as client
from p2pnet.client.passes import Passes
from p2pnet.errors import MalformedError, NotFoundError, UsageError
from p2pnet.v1 import common_pb2, pnode_pb2, vnode_pb2
from p2pnet.vnode import gathering, outputs, tensors
from p2pnet.vnode.draft import BATCH_MAX
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.network import REASON_CHARS_MAX
from p2pnet.vnode.tensors import Array, Buffer, decode, encode

BAD_REQUEST = common_pb2.REFUSAL_CODE_BAD_REQUEST
TOO_LARGE = common_pb2.REFUSAL_CODE_TOO_LARGE
GRAPH = small_graph()
NETWORK = network_of(GRAPH)
HERE = dict.fromkeys(ORDER, "a")
SPREAD = dict(zip(ORDER, "abcabc", strict=True))


def samples(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)


async def trained_swarm(swarm: MemorySwarm, steps: int) -> Any:
    session = MemorySession(swarm)
    network = await submit(session, swarm["a"].peer_id)
    await train(session, network, steps)
    return session, network


@pytest.mark.parametrize("count", [0, 1, 4, 300, 1100])
def test_three_hosts_say_what_torch_says(tmp_path: Path, count: int) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await trained_swarm(swarm, 3)
            hosts = {it.host for it in (await session.status(network)).locations}
            assert len(hosts) == 3
            x = samples(count)
            output = (await client.infer_all(Passes(session, network, GRAPH), {"x": x})).output
            expected = plain_output(3, x)
            assert output.shape == expected.shape == (count, 3)
            assert output.dtype == expected.dtype
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)

    play(main())


def test_inference_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await trained_swarm(swarm, 3)
            before = {v: ref.digest for v, ref in (await session.cut(network)).items()}
            await client.infer_all(Passes(session, network, GRAPH), {"x": samples(9)})
            trained = await train(session, network, 4, first=4)
            assert trained.digest == plain(4)[0]
            after = {v: ref.digest for v, ref in (await session.cut(network)).items()}
            assert after != before

    play(main())


@pytest.mark.parametrize(
    ("inputs", "error", "why"),
    [
        ({"x": np.zeros((2, 5), np.float32)}, UsageError, r"\[6\] a sample"),
        ({"x": np.zeros((2, 6), np.int64)}, UsageError, "float32"),
        ({"z": np.zeros((2, 6), np.float32)}, UsageError, "no input 'z'"),
        ({}, NotFoundError, "needs the input 'x'"),
    ],
)
def test_inputs_that_do_not_fit_are_not_sent(
    tmp_path: Path, inputs: dict[str, Array], error: type[Exception], why: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            with pytest.raises(error, match=why):
                await client.infer_all(Passes(session, network, GRAPH), inputs)
            assert not [it for it in swarm.letters if it.method == "VNode/Forward"]

    play(main())


def test_a_host_that_dies_on_the_way_costs_a_little_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await trained_swarm(swarm, 3)
            killed: list[str] = []

            def hook(letter: Letter) -> None:
                stranger = letter.source not in swarm.nodes
                spared = letter.to == swarm["a"].peer_id  # the orchestrator
                if letter.method == "VNode/Forward" and not (stranger or spared or killed):
                    killed.append(letter.to)
                    swarm.kill(letter.to)

            swarm.before.append(hook)
            x = samples(5)
            output = (await client.infer_all(Passes(session, network, GRAPH), {"x": x})).output
            assert len(killed) == 1
            np.testing.assert_allclose(output, plain_output(3, x), rtol=1e-5, atol=1e-6)

    play(main())


# By hand, on hosts without an orchestrator


def forward(
    vnode: str, source: str, array: Array, request_id: bytes, /, **changes: Any
) -> tuple[vnode_pb2.ForwardRequest, Buffer]:
    head, payload = encode(array)
    fields: dict[str, Any] = {
        "network_id": NETWORK,
        "epoch": 1,
        "request_id": request_id,
        "vnode": vnode,
        "source": source,
        "slot": GRAPH.node(vnode).inputs.index(source),
        "tensor": head,
    }
    return vnode_pb2.ForwardRequest(**(fields | changes)), payload


async def give(
    swarm: MemorySwarm, name: str, what: tuple[vnode_pb2.ForwardRequest, Buffer]
) -> common_pb2.Refusal:
    reply, _ = await swarm.ask_hop(name, *what)
    return reply.refusal


async def collect(
    swarm: MemorySwarm, name: str, request_id: bytes, timeout_s: float = 5.0, *, epoch: int = 1
) -> tuple[vnode_pb2.HopReply, memoryview | None]:
    request = vnode_pb2.CollectRequest(
        network_id=NETWORK, epoch=epoch, request_id=request_id, vnode="out"
    )
    source = keypair_of("stranger").peer_id
    return await swarm.hop(source, swarm[name].peer_id, request, None, timeout_s)


def is_right(answer: tuple[vnode_pb2.HopReply, memoryview | None], x: Array) -> bool:
    """Whether it is the untrained network's output."""
    reply, payload = answer
    assert not reply.HasField("refusal"), reply.refusal
    output = decode(reply.tensor, payload, bytes_max=1 << 20)
    return np.allclose(output, plain_output(0, x), rtol=1e-5, atol=1e-6)


async def ask(swarm: MemorySwarm, hosts: dict[str, str], x: Array, request_id: bytes) -> None:
    for vnode in ("fc1", "skip"):
        assert (await give(swarm, hosts[vnode], forward(vnode, "x", x, request_id))).code == 0


def test_the_output_waits_for_who_comes_late(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, SPREAD, lease_s=600)
            x = samples(4)
            waiting = asyncio.ensure_future(collect(swarm, SPREAD["out"], b"early"))
            await asyncio.sleep(1)
            await ask(swarm, SPREAD, x, b"early")
            assert is_right(await waiting, x)
            for request_id in (b"late", b"later"):
                await ask(swarm, SPREAD, x, request_id)
            await asyncio.sleep(30)
            assert is_right(await collect(swarm, SPREAD["out"], b"late"), x)
            await asyncio.sleep(60)  # and it is not kept for ever
            gone, _ = await collect(swarm, SPREAD["out"], b"later")
            assert gone.refusal.code == common_pb2.REFUSAL_CODE_FAILED

    play(main())


def test_the_host_that_makes_the_output_answers_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, HERE)
            x = samples(4)
            (first, *rest) = [forward(vnode, "x", x, b"id") for vnode in ("fc1", "skip")]
            assert (await give(swarm, "a", first)).code == 0
            for request, payload in rest:
                request.collect = True
                assert is_right(await swarm.ask_hop("a", request, payload), x)

    play(main())


def test_an_output_that_does_not_come_is_a_refusal_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, SPREAD)
            began = swarm.loop.time()
            reply, _ = await collect(swarm, SPREAD["out"], b"never", timeout_s=3)
            assert swarm.loop.time() - began < 3
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_FAILED
            assert reply.refusal.detail == "the output has not come in time"

    play(main())


@pytest.mark.parametrize(
    ("error", "bad_input"),
    [
        (RuntimeError("no more registers"), False),
        (UsageError("no more paper"), False),
        (MalformedError("no such colour"), True),
    ],
)
def test_a_stage_that_fails_says_so_to_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, bad_input: bool
) -> None:
    real = Hosted.do_infer

    def broken(self: Hosted, nodes: Any, *rest: Any) -> Any:
        if "act" in nodes:
            raise error
        return real(self, nodes, *rest)

    monkeypatch.setattr(Hosted, "do_infer", broken)
    code = BAD_REQUEST if bad_input else common_pb2.REFUSAL_CODE_FAILED

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, SPREAD)
            await ask(swarm, SPREAD, samples(4), b"id")
            began = swarm.loop.time()
            reply, _ = await collect(swarm, SPREAD["out"], b"id", timeout_s=15)
            assert swarm.loop.time() - began < 1
            assert reply.refusal.code == code
            assert str(error) in reply.refusal.detail

    play(main())


def test_what_is_passed_on_of_a_failure_is_short(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, SPREAD)
            failed = forward("out", "skip", samples(1), b"id", failed="no " * 100_000)
            assert (await give(swarm, SPREAD["out"], failed)).code == 0
            reply, _ = await collect(swarm, SPREAD["out"], b"id")
            assert len(reply.refusal.detail) == REASON_CHARS_MAX

    play(main())


def test_a_client_gives_up_on_a_network_that_always_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Hosted, *rest: Any) -> Any:
        raise RuntimeError("no more registers")

    monkeypatch.setattr(Hosted, "do_infer", broken)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            began = swarm.loop.time()
            outcome = await client.infer_all(Passes(session, network, GRAPH), {"x": samples(3000)})
            assert 60 < swarm.loop.time() - began < 90, "one waits, and the others do not any more"
            assert [(it.first, it.last) for it in outcome.missing][-1] == (2816, 2999)
            assert len(outcome.missing) == 12
            assert "no more registers" in outcome.missing[0].reason
            assert "waited 60 s" in outcome.missing[0].reason
            assert np.isnan(outcome.output).all()

    play(main())


BAD: dict[str, dict[str, Any]] = {
    "shape": {"tensor": encode(samples(4)[:, :5])[0]},
    "dtype": {"tensor": encode(samples(4).astype(np.float64))[0]},
    "no samples dimension": {"tensor": encode(np.array(1.0, np.float32))[0]},
    "no samples": {"tensor": encode(samples(0))[0]},
    "too many samples": {"tensor": encode(np.zeros((BATCH_MAX + 1, 6), np.float32))[0]},
    "no tensor": {"tensor": common_pb2.Tensor()},
    "slot": {"slot": 7},
    "source": {"source": "fc2"},
    "long id": {"request_id": bytes(65)},
    "long session": {"session": bytes(65)},
    "session of what is no sequence": {"session": b"s", "tensor": encode(samples(4)[:, :5])[0]},
}


@pytest.mark.parametrize("what", BAD)
def test_a_tensor_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, HERE)
            with monkeypatch.context() as patched:
                patched.setattr(tensors, "decode", lambda *args, **kwargs: pytest.fail("decoded"))
                request = forward("fc1", "x", samples(4), b"id", **BAD[what])
                refused = await give(swarm, "a", request)
                too_large = what == "too many samples"
                assert refused.code == (TOO_LARGE if too_large else BAD_REQUEST)
            head, payload = forward("fc1", "x", samples(4), b"id")
            short = await give(swarm, "a", (head, memoryview(payload)[1:]))
            assert short.code == BAD_REQUEST
            x = samples(4)
            await ask(swarm, HERE, x, b"id")  # and the right one still counts
            assert is_right(await collect(swarm, "a", b"id"), x)

    play(main())


def test_requests_that_are_never_finished_give_way_to_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "REQUESTS_MAX", 4)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, HERE)
            x = samples(4)
            ids = [os.urandom(16) for _ in range(6)]
            for request_id in ids:  # half of what `skip` needs
                assert (await give(swarm, "a", forward("skip", "x", x, request_id))).code == 0
            answered = []
            for request_id in reversed(ids):
                assert (await give(swarm, "a", forward("fc1", "x", x, request_id))).code == 0
                reply, _ = await collect(swarm, "a", request_id, timeout_s=2)
                answered.append(reply.HasField("tensor"))
            assert answered == [True, True, True, True, False, False]

    play(main())


def test_outputs_that_nobody_fetches_give_way_to_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "OUTPUTS_MAX", 4)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, HERE)
            ids = [os.urandom(16) for _ in range(6)]
            for request_id in ids:
                await ask(swarm, HERE, samples(4), request_id)
                await asyncio.sleep(0.1)
            answered = [
                (await collect(swarm, "a", request_id, timeout_s=2))[0].HasField("tensor")
                for request_id in reversed(ids)
            ]
            assert answered == [True, True, True, True, False, False]

    play(main())


def moved(log_hosts: Any, swarm: MemorySwarm, name: str, epoch: int, **changes: Any) -> Any:
    mine = [vnode for vnode in ORDER if log_hosts[vnode] == name]
    return allocate(swarm, name, GRAPH, mine, epoch=epoch, hosts=log_hosts, **changes)


def test_a_pass_goes_where_the_vnodes_live_now(tmp_path: Path) -> None:
    """A host is at an epoch that is over; the next one tells it, and the pass goes on there."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            before = dict(zip(ORDER, "abcbcc", strict=True))
            await place(swarm, GRAPH, before)
            now = {vnode: "d" if name == "c" else name for vnode, name in before.items()}
            for name in "bd":  # "a" has not heard yet, and "c" never will
                assert not (await moved(now, swarm, name, 2)).HasField("refusal")
            x = samples(4)
            assert (await give(swarm, "a", forward("fc1", "x", x, b"id"))).code == 0
            there = forward("skip", "x", x, b"id")
            refused = await give(swarm, "b", there)
            assert refused.code == common_pb2.REFUSAL_CODE_STALE_EPOCH
            assert (refused.host, refused.epoch) == (swarm["b"].peer_id, 2)
            there[0].epoch = 2
            assert (await give(swarm, "b", there)).code == 0
            assert is_right(await collect(swarm, "d", b"id", epoch=2), x)

    play(main())


def test_a_client_with_old_allocations_is_sent_on(tmp_path: Path) -> None:
    """All VNodes have moved and the DHT has not heard of it: the hosts say where they are."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            rows = await session.where_is(network)
            names = {row.vnode: swarm.nodes[row.peer_id].name for row in rows}
            history = await swarm.log_of(network.network_id)
            keepers = swarm.names(history.keepers)
            log = Log.of(GRAPH, history, keepers)
            following = dict(zip("abcd", "bcda", strict=True))
            now = {vnode: following[name] for vnode, name in names.items()}
            claim = log.claim("a", now)
            await teach(swarm, log, names=keepers, by="a")
            for name in dict.fromkeys(now.values()):
                mine = [vnode for vnode in ORDER if now[vnode] == name]
                request = allocation(
                    GRAPH, mine, claim, epoch=2, network_id=network.network_id,
                    manifest=log.manifest,
                )  # fmt: skip
                reply = await swarm.ask(
                    name, "PNode/Allocate", request, pnode_pb2.AllocateReply, by="a"
                )
                assert not reply.HasField("refusal"), reply.refusal
            x = samples(4)
            before = swarm.loop.time()
            output = (await client.infer_all(Passes(session, network, GRAPH), {"x": x})).output
            np.testing.assert_allclose(output, plain_output(0, x), rtol=1e-5, atol=1e-6)
            assert swarm.loop.time() - before < 0.3, "it had to try again"

    play(main())
