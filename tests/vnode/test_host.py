"""What a host agrees to, and what it refuses to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosting import (
    BOSS,
    ORDER,
    RIVAL,
    allocate,
    allocation,
    claim_for,
    feed,
    log_of,
    manifest_of,
    network_of,
    place,
    teach,
    training_input,
)
from memory_swarm import MemorySwarm
from memory_wire import keypair_of
from small_network import batch, plain, small_graph
from virtual_time import play

from p2pnet.clock import wall_ms
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.records import ALLOCATION, make_record
from p2pnet.errors import RefusedError
from p2pnet.keys import ACCEPTANCE, sha256, verify
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2, vnode_pb2
from p2pnet.vnode import refusing, standing, tenancy_shell
from p2pnet.vnode.blob_ages import UNNAMED_KEPT_S
from p2pnet.vnode.draft import BATCH_MAX
from p2pnet.vnode.hosting import Hosting, Usage
from p2pnet.vnode.shell import READY_KEPT_S, READYING_MAX
from p2pnet.vnode.state import decode_state, model_digest, weights_of

GRAPH = small_graph()
NETWORK = network_of(GRAPH)
EVERYWHERE_A = dict.fromkeys(ORDER, "a")


def code(name: str) -> int:
    return common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{name}")


# Allocating


def test_what_is_agreed_to_comes_back_signed_by_the_host(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            reply = await allocate(swarm, "a", GRAPH, ["fc1", "out"], epoch=3)
            said = [records_pb2.Allocation.FromString(it.payload) for it in reply.acceptances]
            assert [it.vnode for it in said] == ["fc1", "out"]
            for signed, it in zip(reply.acceptances, said, strict=True):
                assert verify(ACCEPTANCE, signed) == it.host == swarm["a"].peer_id
                assert (it.network_id, it.epoch, it.lease_s) == (NETWORK, 3, 60)
                assert it.claimant == keypair_of(BOSS).peer_id
                assert it.manifest == manifest_of(GRAPH)
            again = await allocate(swarm, "a", GRAPH, ["fc1", "out"], epoch=3)
            assert again == reply  # an answer may be lost
            host = swarm["a"].host
            assert host.usage.vnodes == 2
            wanted = sum(GRAPH.memory_bytes(vnode) for vnode in ("fc1", "out"))
            assert host.usage.memory_bytes == wanted
            assert host.claimants() == [keypair_of(BOSS).peer_id]
            assert swarm.providers == {
                vnode_key(NETWORK, vnode): [swarm["a"].peer_id] * 2 for vnode in ("fc1", "out")
            }

    play(main())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another network's id": ({"network_id": "0" * 32}, "BAD_REQUEST"),
    "another graph": ({"graph": small_graph(seed=9).to_json()}, "BAD_REQUEST"),
    "no graph": ({"graph": b"{}"}, "BAD_REQUEST"),
    "no VNodes": ({"vnodes": []}, "BAD_REQUEST"),
    "an unknown VNode": ({"vnodes": ["fc1", "fc9"]}, "BAD_REQUEST"),
    "a VNode twice": ({"vnodes": ["fc1", "fc1"]}, "BAD_REQUEST"),
    "no lease": ({"lease_s": 0}, "BAD_REQUEST"),
    "a lease for ever": ({"lease_s": 10**6}, "BAD_REQUEST"),
    "an unsigned manifest": (
        {"manifest": common_pb2.Signed(payload=manifest_of(GRAPH).payload)},
        "BAD_REQUEST",
    ),
    "a stranger": ({"by": "stranger"}, "NOT_GRANTED"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_allocation_that_does_not_hold_is_refused(tmp_path: Path, what: str) -> None:
    changes, expected = REFUSED[what]

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            reply = await allocate(swarm, "a", GRAPH, **changes)
            assert reply.refusal.code == code(expected), reply.refusal
            assert reply.refusal.detail
            assert not reply.acceptances
            assert swarm["a"].host.usage.vnodes == 0

    play(main())


def test_a_host_takes_no_more_than_it_lends(tmp_path: Path) -> None:
    lent = sum(GRAPH.memory_bytes(vnode) for vnode in ("fc1", "act"))

    async def main() -> None:
        async with MemorySwarm(tmp_path, "") as swarm:
            swarm.add("a", lent_bytes=lent)
            swarm.add("client", hosting=False)
            reply = await allocate(swarm, "a", GRAPH, ["fc1", "act", "fc2"])
            assert reply.refusal.code == code("NO_MEMORY")
            assert str(lent) in reply.refusal.detail
            reply = await allocate(swarm, "a", GRAPH, ["fc1"], epoch=2)
            assert not reply.HasField("refusal")
            # what the network has here already is free for it
            reply = await allocate(swarm, "a", GRAPH, ["fc1", "act"], epoch=3)
            assert not reply.HasField("refusal")
            reply = await allocate(swarm, "a", small_graph(name="other"), ["fc1"])
            assert reply.refusal.code == code("NO_MEMORY")
            reply = await allocate(swarm, "client", GRAPH, ["fc1"], epoch=4)
            assert reply.refusal.code == code("NOT_GRANTED")

    play(main())


def test_networks_that_are_gone_make_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "NETWORKS_MAX", 2)
    graphs = [small_graph(seed=seed) for seed in range(4)]

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            for graph in graphs[:2]:
                assert not (await allocate(swarm, "a", graph)).HasField("refusal")
            reply = await allocate(swarm, "a", graphs[2])
            assert reply.refusal.code == code("NO_MEMORY")
            for graph in graphs[:2]:
                drop = pnode_pb2.DropRequest(network_id=network_of(graph), epoch=1)
                await swarm.ask("a", "PNode/Drop", drop, pnode_pb2.DropReply, by=BOSS)
            for graph in graphs[2:]:
                assert not (await allocate(swarm, "a", graph)).HasField("refusal")

    play(main())


# Epochs and claimants


def test_only_a_newer_epoch_moves_a_host_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            assert not (await allocate(swarm, "a", GRAPH, epoch=2)).HasField("refusal")
            for by, epoch in ((BOSS, 1), (RIVAL, 1), (RIVAL, 2)):
                reply = await allocate(swarm, "a", GRAPH, epoch=epoch, by=by)
                assert reply.refusal.code == code("STALE_EPOCH")
                assert reply.refusal.epoch == 2
            assert swarm["a"].host.claimants() == [keypair_of(BOSS).peer_id]
            reply = await allocate(swarm, "a", GRAPH, ["out"], epoch=3, by=RIVAL)
            assert not reply.HasField("refusal")
            assert swarm["a"].host.claimants() == [keypair_of(RIVAL).peer_id]
            assert swarm["a"].host.usage.vnodes == 1  # and no other of that network

    play(main())


@pytest.mark.parametrize("newer_first", [False, True])
@pytest.mark.parametrize("claimant", [BOSS, RIVAL])
def test_of_two_allocations_at_once_the_newer_one_holds(
    tmp_path: Path, claimant: str, newer_first: bool
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            everywhere = dict.fromkeys(ORDER, "a")
            await claim_for(swarm, GRAPH, 2, BOSS, everywhere)
            await claim_for(swarm, GRAPH, 3, claimant, everywhere)
            calls = [
                allocate(swarm, "a", GRAPH, epoch=2),
                allocate(swarm, "a", GRAPH, epoch=3, by=claimant),
            ]
            order = [1, 0] if newer_first else [0, 1]
            answers = dict(
                zip(order, await asyncio.gather(*(calls[at] for at in order)), strict=True)
            )
            refused = answers[0].refusal
            assert (refused.code, refused.epoch) == (code("STALE_EPOCH"), 3)
            said = [records_pb2.Allocation.FromString(it.payload) for it in answers[1].acceptances]
            assert {(it.epoch, it.claimant) for it in said} == {(3, keypair_of(claimant).peer_id)}
            assert swarm["a"].host.usage.vnodes == 6

    play(main())


def test_other_threads_read_what_is_never_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(dict[Any, Any]):
        def __iter__(self) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH)
            host = swarm["a"].host
            with monkeypatch.context() as patched:
                patched.setattr(host._hosted, "_present", Changing())
                assert host.claimants() == [keypair_of(BOSS).peer_id]
                assert host.usage.vnodes == 6
            drop = pnode_pb2.DropRequest(network_id=NETWORK, epoch=1)
            await swarm.ask("a", "PNode/Drop", drop, pnode_pb2.DropReply, by=BOSS)
            assert host.claimants() == []

    play(main())


@pytest.mark.parametrize("by", [RIVAL, "stranger"])
@pytest.mark.parametrize("method", ["Heartbeat", "Save", "Load", "Drop"])
def test_what_is_the_claimants_is_nobody_elses(tmp_path: Path, method: str, by: str) -> None:
    calls: dict[str, tuple[str, Any, Any]] = {
        "Heartbeat": (
            "PNode/Heartbeat",
            pnode_pb2.HeartbeatRequest(network_id=NETWORK, epoch=2, lease_s=60),
            pnode_pb2.HeartbeatReply,
        ),
        "Save": (
            "VNode/Save",
            vnode_pb2.SaveRequest(network_id=NETWORK, epoch=2, vnodes=["fc1"]),
            vnode_pb2.SaveReply,
        ),
        "Load": (
            "VNode/Load",
            vnode_pb2.LoadRequest(network_id=NETWORK, epoch=2),
            vnode_pb2.LoadReply,
        ),
        "Drop": (
            "PNode/Drop",
            pnode_pb2.DropRequest(network_id=NETWORK, epoch=9),
            pnode_pb2.DropReply,
        ),
    }  # fmt: skip

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH, epoch=2)
            name, request, reply_type = calls[method]
            reply = await swarm.ask("a", name, request, reply_type, by=by)
            assert reply.refusal.code == code("STALE_EPOCH")
            assert reply.refusal.epoch == 2
            assert swarm["a"].host.usage.vnodes == 6
            reply = await swarm.ask("a", name, request, reply_type, by=BOSS)
            assert not reply.HasField("refusal")

    play(main())


@pytest.mark.parametrize(("epoch", "expected"), [(1, "STALE_EPOCH"), (3, "UNKNOWN_EPOCH")])
def test_messages_of_another_epoch_are_refused_with_ours(
    tmp_path: Path, epoch: int, expected: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH, epoch=2)
            train = training_input(GRAPH, "fc1", "x", batch(1)[0], epoch=epoch)
            reply, _ = await swarm.ask_hop("a", *train)
            assert (reply.refusal.code, reply.refusal.epoch) == (code(expected), 2)
            forward = vnode_pb2.ForwardRequest(network_id=NETWORK, epoch=epoch, vnode="fc1")
            reply, _ = await swarm.ask_hop("a", forward)
            assert (reply.refusal.code, reply.refusal.epoch) == (code(expected), 2)
            collect = vnode_pb2.CollectRequest(network_id=NETWORK, epoch=epoch, vnode="out")
            collected, _ = await swarm.ask_hop("a", collect)
            assert (collected.refusal.code, collected.refusal.epoch) == (code(expected), 2)
            save = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=epoch, vnodes=["fc1"])
            saved = await swarm.ask("a", "VNode/Save", save, vnode_pb2.SaveReply, by=BOSS)
            assert (saved.refusal.code, saved.refusal.epoch) == (code(expected), 2)
            beat = pnode_pb2.HeartbeatRequest(network_id=NETWORK, epoch=epoch, lease_s=60)
            beaten = await swarm.ask(
                "a", "PNode/Heartbeat", beat, pnode_pb2.HeartbeatReply, by=BOSS
            )
            assert (beaten.refusal.code, beaten.refusal.epoch) == (code(expected), 2)

    play(main())


def test_without_renewal_a_lease_ends_and_with_it_all_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH, lease_s=10)
            x, _ = batch(1)

            async def refusal_now() -> common_pb2.Refusal:
                request = training_input(GRAPH, "fc1", "x", x)
                reply, _ = await swarm.ask_hop("a", *request)
                return reply.refusal

            beat = pnode_pb2.HeartbeatRequest(network_id=NETWORK, epoch=1, lease_s=10)
            for _ in range(3):
                await asyncio.sleep(8)
                assert (await refusal_now()).code == 0
                await swarm.ask("a", "PNode/Heartbeat", beat, pnode_pb2.HeartbeatReply, by=BOSS)
            await asyncio.sleep(11)
            refused = await refusal_now()
            assert refused.code == code("LEASE_EXPIRED")
            assert "small" in refused.detail
            # late, but the same claimant under the same epoch: nobody else has it
            await swarm.ask("a", "PNode/Heartbeat", beat, pnode_pb2.HeartbeatReply, by=BOSS)
            assert (await refusal_now()).code == 0

    play(main())


def test_what_nobody_renews_is_let_go_in_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH, lease_s=10)
            await asyncio.sleep(300)
            assert swarm["a"].host.usage.vnodes == 6
            await asyncio.sleep(400)
            assert swarm["a"].host.usage == Usage(0, 0)

    play(main())


# Where a VNode has gone


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_call_for_a_vnode_that_lives_elsewhere_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    if not is_kept:  # a claim too large to be
        monkeypatch.setattr(standing, "NEWEST_BYTES_MAX", 0)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            hosts = {vnode: "b" if vnode == "out" else "a" for vnode in ORDER}
            await place(swarm, GRAPH, hosts)

            async def refused_by(name: str, *message: Any) -> Any:
                reply, _ = await swarm.ask_hop(name, *message)
                assert reply.refusal.code == code("NOT_HOSTED")
                return reply.refusal

            ids: Mapping[str, Any] = {"network_id": NETWORK, "epoch": 1, "vnode": "out"}
            calls = (
                training_input(GRAPH, "out", "skip", batch(1)[0]),
                (vnode_pb2.ForwardRequest(**ids),),
                (vnode_pb2.CollectRequest(**ids),),
            )
            for call in calls:  # the claim says so
                assert (await refused_by("a", *call)).host == swarm["b"].peer_id
            swarm["a"].restart_host()
            for call in calls:
                assert (await refused_by("a", *call)).host == (
                    swarm["b"].peer_id if is_kept else ""
                )
            reply = await allocate(swarm, "b", GRAPH, ["out"], hosts=hosts)
            await publish(swarm, reply.acceptances[0], epoch=1)
            for call in calls:  # the DHT knows
                refused = await refused_by("a", *call)
                assert (refused.host, refused.epoch) == (swarm["b"].peer_id, 1)
            swarm.dht_answers = False
            assert bool((await refused_by("a", *calls[0])).host) == is_kept

    play(main())


async def publish(swarm: MemorySwarm, accepted: common_pb2.Signed, *, epoch: int) -> None:
    """As an orchestrator does: the host's word under the orchestrator's record."""
    vnode = records_pb2.Allocation.FromString(accepted.payload).vnode
    key = vnode_key(NETWORK, vnode)
    boss = keypair_of(BOSS)
    record = make_record(
        boss,
        key,
        ALLOCATION,
        epoch=epoch,
        sequence=wall_ms(),
        ttl_s=60,
        issued_at_ms=wall_ms(),
        body=accepted.SerializeToString(deterministic=True),
    )
    await swarm.keep(boss.peer_id, key, record)


# Tensors that cannot be

X, Y = batch(1)
BAD: dict[str, dict[str, Any]] = {
    "shape": {"array": X[:, :5]},
    "more dimensions": {"array": X[:, None]},
    "dtype": {"array": X.astype(np.float64)},
    "digest": {"tensor_digest": sha256(b"another")},
    "no samples dimension": {
        "vnode": "loss",
        "source": "y",
        "array": np.array(1),
        "batch_samples": 4,
    },
    "no samples": {"array": X[:0]},
    "too many samples": {"array": np.zeros((BATCH_MAX + 1, 6), np.float32)},
    "a shape without end": {
        "tensor": common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[2**40] * 9)
    },
    "payload cut short": {},
    "no tensor": {"tensor": common_pb2.Tensor()},
    "no direction": {"direction": vnode_pb2.DIRECTION_UNSPECIFIED},
    "slot": {"slot": 1},
    "unknown source": {"source": "z", "slot": 0},
    "another source": {"source": "fc1", "slot": 0, "array": X},
    "micro-batch": {"id": vnode_pb2.StepId(network_id=NETWORK, epoch=1, step=1, micro_batch=1)},
    "a step decided that was never reported": {"decided_step": 7},
}


@pytest.mark.parametrize("what", BAD)
def test_a_tensor_that_cannot_be_is_refused_and_leaves_no_trace(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A)
            changes = {"vnode": "fc1", "source": "x", "array": X} | BAD[what]
            if "slot" in changes and changes["source"] != "x":
                source, changes["source"] = changes["source"], "x"
                request, payload = training_input(GRAPH, **changes)
                request.source = source
            else:
                request, payload = training_input(GRAPH, **changes)
            if what == "payload cut short":
                payload = bytes(payload)[:1]
            reply, _ = await swarm.ask_hop("a", request, payload)
            codes = {"too many samples": "TOO_LARGE", "another source": "NOT_GRANTED"}
            expected = codes.get(what, "BAD_REQUEST")
            assert reply.refusal.code == code(expected), reply.refusal
            assert reply.refusal.detail
            assert await trained_alone(swarm, 3) == plain(3)[0]

    play(main())


async def trained_alone(swarm: MemorySwarm, steps: int) -> str:
    """Trains the network, which is all on node "a", without an orchestrator; the digest."""
    for step in range(1, steps + 1):
        await feed(swarm, GRAPH, EVERYWHERE_A, batch(step), step=step)
        said = await saved(swarm, step)
    weights: dict[str, Any] = {}
    for vnode, ref in said.states.items():
        weights |= weights_of(vnode, decode_state(swarm["a"].store.get(ref.digest.hex()))[0])
    return model_digest(weights)


async def saved(swarm: MemorySwarm, step: int) -> vnode_pb2.SaveReply:
    request = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=1, step=step, vnodes=ORDER)
    async with asyncio.timeout(30):
        while True:  # a step that is not done yet is "not reported"
            reply = await swarm.ask("a", "VNode/Save", request, vnode_pb2.SaveReply, by=BOSS)
            if "has not reported" not in reply.refusal.detail:
                break
            await asyncio.sleep(0.01)
    assert not reply.HasField("refusal"), reply.refusal
    return reply


# Saving, loading, dropping


def test_a_state_that_is_past_or_to_come_is_not_saved(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A)
            assert await trained_alone(swarm, 2) == plain(2)[0]
            for step, why in ((1, "is past the state"), (3, "has not reported step 3")):
                request = vnode_pb2.SaveRequest(
                    network_id=NETWORK, epoch=1, step=step, vnodes=["fc1"]
                )
                reply = await swarm.ask("a", "VNode/Save", request, vnode_pb2.SaveReply, by=BOSS)
                assert reply.refusal.code == code("FAILED")
                assert why in reply.refusal.detail
            request = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=1, step=2, vnodes=["nobody"])
            reply = await swarm.ask("a", "VNode/Save", request, vnode_pb2.SaveReply, by=BOSS)
            assert reply.refusal.code == code("BAD_REQUEST")

    play(main())


def test_a_host_goes_on_from_the_states_that_it_is_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A)
            await trained_alone(swarm, 2)
            states = dict((await saved(swarm, 2)).states)
            reply = await allocate(swarm, "b", GRAPH, epoch=2, step=2, states=states)
            assert not reply.HasField("refusal")
            load = vnode_pb2.LoadRequest(network_id=NETWORK, epoch=2, step=2, states=states)
            loaded = await swarm.ask("b", "VNode/Load", load, vnode_pb2.LoadReply, by=BOSS)
            assert not loaded.HasField("refusal"), loaded.refusal
            request = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=2, step=2, vnodes=ORDER)
            again = await swarm.ask("b", "VNode/Save", request, vnode_pb2.SaveReply, by=BOSS)
            for vnode in ORDER:
                assert again.states[vnode].digest == states[vnode].digest

            # the state of another step is not taken for that of this one
            reply = await allocate(swarm, "b", GRAPH, ["fc1"], epoch=3, step=5, states=states)
            load.epoch, load.step = 3, 5
            for vnode in ORDER[1:]:
                del load.states[vnode]
            loaded = await swarm.ask("b", "VNode/Load", load, vnode_pb2.LoadReply, by=BOSS)
            assert loaded.refusal.code == code("FAILED")
            assert "of step 2, not 5" in loaded.refusal.detail
            described = await swarm.ask(
                "b", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
            )
            assert [(it.vnode, it.epoch) for it in described.vnodes] == [("fc1", 3)]
            assert "of step 2, not 5" in described.vnodes[0].error

    play(main())


def test_dropping_is_of_the_epoch_that_is_named_and_older_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH, epoch=5)

            async def drop(epoch: int, *vnodes: str) -> int:
                request = pnode_pb2.DropRequest(network_id=NETWORK, epoch=epoch, vnodes=vnodes)
                reply = await swarm.ask("a", "PNode/Drop", request, pnode_pb2.DropReply, by=BOSS)
                assert not reply.HasField("refusal")
                return swarm["a"].host.usage.vnodes

            assert await drop(4) == 6  # a message that was long on its way
            assert await drop(5, "fc1") == 5
            assert await drop(5) == 0
            assert await drop(5) == 0

    play(main())


def test_health_and_first_contact(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await allocate(swarm, "a", GRAPH, ["fc1", "out"])
            health = await swarm.ask(
                "a",
                "VNode/Health",
                vnode_pb2.HealthRequest(network_id=NETWORK),
                vnode_pb2.HealthReply,
            )
            assert [(it.vnode, it.epoch, it.step, it.instantiated) for it in health.vnodes] == [
                ("fc1", 1, 0, False),
                ("out", 1, 0, False),
            ]
            request = pnode_pb2.RegisterRequest(advert=swarm["b"].advert())
            reply = await swarm.ask("a", "PNode/Register", request, pnode_pb2.RegisterReply, by="b")
            assert reply.advert == swarm["a"].advert()
            with pytest.raises(RefusedError):  # somebody else's
                await swarm.ask("a", "PNode/Register", request, pnode_pb2.RegisterReply, by="c")

    play(main())


def test_a_host_that_cannot_begin_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            with monkeypatch.context() as patched:
                patched.setattr(Hosting, "_begin", lambda self, effect: 1 // 0)
                reply = await allocate(swarm, "a", GRAPH)
                assert reply.refusal.code == code("FAILED")
                assert "by zero" in reply.refusal.detail
            assert "could not do what it had decided" in caplog.text
            assert swarm["a"].host.usage == Usage(0, 0)
            beat = pnode_pb2.HeartbeatRequest(network_id=NETWORK, epoch=1, lease_s=10)
            said = await swarm.ask("a", "PNode/Heartbeat", beat, pnode_pb2.HeartbeatReply, by=BOSS)
            assert said.refusal.code == code("NOT_HOSTED")
            assert not (await allocate(swarm, "a", GRAPH, epoch=2)).HasField("refusal")

    play(main())


def test_those_who_wait_for_an_answer_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenancy_shell, "ASKS_MAX", 1)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            claim = await claim_for(swarm, GRAPH, 1, BOSS, dict.fromkeys(ORDER, "b"))
            request = allocation(GRAPH, ORDER, claim)
            asks = [
                swarm.ask("b", "PNode/Allocate", request, pnode_pb2.AllocateReply, by=BOSS)
                for _ in range(2)
            ]
            one, other = await asyncio.gather(*asks)
            assert [one.refusal.code, other.refusal.code] == [0, code("BUSY")]

    play(main())


# After a restart, and before a claim


def test_a_host_that_was_restarted_falls_for_no_older_claim(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await claim_for(swarm, GRAPH, 1, RIVAL, dict.fromkeys(ORDER, "b"))
            assert not (await allocate(swarm, "b", GRAPH, epoch=2)).HasField("refusal")
            swarm["b"].restart_host()
            assert swarm["b"].host.usage.vnodes == 0
            swarm.kill(swarm["a"].peer_id)  # the keeper: nobody can be asked
            reply = await allocate(swarm, "b", GRAPH, epoch=1, by=RIVAL)
            assert (reply.refusal.code, reply.refusal.epoch) == (code("STALE_EPOCH"), 2)

    play(main())


def test_a_log_that_cannot_be_read_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            claim = await claim_for(swarm, GRAPH, 1, BOSS, dict.fromkeys(ORDER, "b"))
            swarm.freeze(swarm["a"].peer_id)
            request = allocation(GRAPH, ORDER, claim)
            reply_type = pnode_pb2.AllocateReply
            reply = await swarm.ask("b", "PNode/Allocate", request, reply_type, by=BOSS)
            assert reply.refusal.code == code("BUSY")
            swarm.thaw(swarm["a"].peer_id)
            reply = await swarm.ask("b", "PNode/Allocate", request, reply_type, by=BOSS)
            assert not reply.HasField("refusal"), reply.refusal

    play(main())


def test_a_claim_that_its_keepers_hear_of_later(tmp_path: Path) -> None:
    """The claimant tells hosts and keepers at the same time."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await claim_for(swarm, GRAPH, 1, BOSS, dict.fromkeys(ORDER, "a"))
            log = log_of(swarm, GRAPH)
            claim = log.claim(BOSS, dict.fromkeys(ORDER, "b"))
            request = allocation(GRAPH, ORDER, claim, epoch=2)
            asking = asyncio.ensure_future(
                swarm.ask("b", "PNode/Allocate", request, pnode_pb2.AllocateReply, by=BOSS)
            )
            await asyncio.sleep(0.5)
            assert not asking.done()
            await teach(swarm, log)
            assert not (await asking).HasField("refusal")

    play(main())


def test_a_host_gets_ready_before_it_is_given_anything(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A)
            await trained_alone(swarm, 1)
            states = dict((await saved(swarm, 1)).states)
            request = pnode_pb2.ReadyRequest(
                network_id=NETWORK,
                manifest=manifest_of(GRAPH),
                graph=GRAPH.to_json(),
                vnodes=ORDER,
                states=states,
            )

            async def ready(by: str = BOSS) -> common_pb2.Refusal:
                reply = await swarm.ask("b", "PNode/Ready", request, pnode_pb2.ReadyReply, by=by)
                return reply.refusal

            assert (await ready("stranger")).code == code("NOT_GRANTED")
            assert (await ready()).code == 0
            fetched = [letter for letter in swarm.letters if letter.method == "Blob/Get"]
            assert len(fetched) == len({ref.digest for ref in states.values()})
            swarm.letters.clear()
            reply = await allocate(swarm, "b", GRAPH, epoch=2, step=1, states=states)
            assert not reply.HasField("refusal")
            load = vnode_pb2.LoadRequest(network_id=NETWORK, epoch=2, step=1, states=states)
            loaded = await swarm.ask("b", "VNode/Load", load, vnode_pb2.LoadReply, by=BOSS)
            assert not loaded.HasField("refusal"), loaded.refusal
            # and under the next claim, which leaves it where it is, nothing is fetched either
            reply = await allocate(swarm, "b", GRAPH, epoch=3, step=1, states=states)
            assert not reply.HasField("refusal")
            load.epoch = 3
            loaded = await swarm.ask("b", "VNode/Load", load, vnode_pb2.LoadReply, by=BOSS)
            assert not loaded.HasField("refusal"), loaded.refusal
            assert not [letter for letter in swarm.letters if letter.method == "Blob/Get"]

            swarm["b"].host.drain()
            assert (await ready()).code == code("DRAINING")

    play(main())


def test_what_was_fetched_for_a_network_that_never_comes_goes_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A)  # and nobody looks after any network
            held = [await swarm["a"].blobs.store(data, NETWORK, [], "") for data in (b"1", b"2")]
            await swarm["b"].blobs.store(b"2", "1" * 32, [], "")  # another network's as well
            request = pnode_pb2.ReadyRequest(
                network_id=NETWORK,
                manifest=manifest_of(GRAPH),
                graph=GRAPH.to_json(),
                vnodes=["fc1", "out"],
                states=dict(zip(("fc1", "out"), held, strict=True)),
            )
            reply = await swarm.ask("b", "PNode/Ready", request, pnode_pb2.ReadyReply, by=BOSS)
            assert not reply.HasField("refusal"), reply.refusal

            def there() -> list[bool]:
                return [swarm["b"].store.has(ref.digest.hex()) for ref in held]

            assert there() == [True, True]
            await asyncio.sleep(READY_KEPT_S + 1)
            assert there() == [False, True]

    play(main())


def test_a_state_that_nobody_has_is_said_when_a_host_gets_ready(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            ref = common_pb2.BlobRef(digest=sha256(b"lost"), size_bytes=4)
            request = pnode_pb2.ReadyRequest(
                network_id=NETWORK,
                manifest=manifest_of(GRAPH),
                graph=GRAPH.to_json(),
                vnodes=["fc1"],
                states={"fc1": ref},
            )
            for _ in range(2 * READYING_MAX):  # each makes room for the next
                reply = await swarm.ask("a", "PNode/Ready", request, pnode_pb2.ReadyReply, by=BOSS)
                assert reply.refusal.code == code("STATE_LOST")
                assert "could not get ready" in reply.refusal.detail

    play(main())


def test_states_are_let_go_on_the_word_of_the_networks_orchestrator_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            everywhere = dict.fromkeys(ORDER, "a")
            older = await claim_for(swarm, GRAPH, 1, RIVAL, everywhere)
            newer = await claim_for(swarm, GRAPH, 2, BOSS, everywhere)
            await swarm["b"].blobs.store(b"a state", NETWORK, [], "")
            await asyncio.sleep(UNNAMED_KEPT_S + 1)

            async def retain(by: str, claim: common_pb2.Signed | None) -> int:
                request = vnode_pb2.RetainRequest(network_id=NETWORK, claim=claim)
                reply = await swarm.ask("b", "Blob/Retain", request, vnode_pb2.RetainReply, by=by)
                return reply.refusal.code

            assert await retain("stranger", None) == code("NOT_GRANTED")
            assert await retain("stranger", newer) == code("NOT_GRANTED")
            assert await retain(RIVAL, older) == code("STALE_EPOCH")
            assert swarm["b"].store.has(sha256(b"a state").hex())
            assert await retain(BOSS, newer) == 0
            assert not swarm["b"].store.has(sha256(b"a state").hex())

    play(main())


def test_a_host_says_where_it_keeps_states_and_whom_it_serves(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a", state_url=url) as swarm:
            said = await swarm.ask(
                "a", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
            )
            assert (said.state_url, said.service) == (url, "")

    play(main())


def test_where_a_state_goes_is_the_owners_to_say(tmp_path: Path) -> None:
    """Not the orchestrator's: a directory that it names is not written."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await place(swarm, GRAPH, EVERYWHERE_A, state_url=f"file://{tmp_path}/elsewhere")
            await trained_alone(swarm, 1)
            said = await saved(swarm, 1)
            assert all(swarm["a"].store.has(ref.digest.hex()) for ref in said.states.values())
            assert not (tmp_path / "elsewhere").exists()

    play(main())
