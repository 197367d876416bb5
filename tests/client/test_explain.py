"""`explain` over logs made by hand: moves, void entries, signatures that do not hold."""

from __future__ import annotations

import asyncio
import importlib
import json
from typing import Any

import pytest
from claims import Log
from click.testing import CliRunner
from memory_wire import keypair_of
from small_network import SMALL

from p2pnet import keys
from p2pnet.client.explain import check_log, explain, network_history, vnode_history
from p2pnet.client.session import NetworkInfo
from p2pnet.errors import MalformedError, NotFoundError, UnreachableError
from p2pnet.log.history import new_claim, new_commit
from p2pnet.orchestrator.spec import load_spec
from p2pnet.v1 import common_pb2, control_pb2

GRAPH = load_spec(SMALL)
FIRST = dict.fromkeys(GRAPH.vnodes(), "a") | {"fc2": "b"}
SECOND = dict.fromkeys(GRAPH.vnodes(), "c") | {"fc2": "b"}
VNODE = GRAPH.vnodes()[0]


def peer(name: str) -> str:
    return keypair_of(name).peer_id


def a_takeover(**fields: Any) -> Log:
    """o places everything on a and b; two cuts; then p takes over and moves what a had to c."""
    log = Log(GRAPH, **fields)
    log.add(log.proposal("o", FIRST, reason="submitted"))
    log.commit("o", 20)
    log.commit("o", 40)
    log.add(log.proposal("p", SECOND, reason="peer …aaa is gone"))
    log.commit("p", 60)
    return log


@pytest.mark.parametrize("fields", [{"keepers": "xyz"}, {"state_url": "file:///x"}])
def test_a_vnodes_history_says_who_put_it_where_and_why(fields: dict[str, Any]) -> None:
    log = a_takeover(**fields)
    rows = vnode_history(check_log(log.network_id, log.entries), VNODE)
    keepers = sorted(map(peer, fields.get("keepers", "")))
    shared = {"kind": "claim", "signature_ok": True, "counts": True, "void": "", "keepers": keepers}
    assert rows == [
        {
            **shared, "slot": 1, "epoch": 1, "host": peer("a"), "from": None,
            "orchestrator": peer("o"), "reason": "submitted", "commits": [20, 40],
        },
        {
            **shared, "slot": 4, "epoch": 2, "host": peer("c"), "from": peer("a"),
            "orchestrator": peer("p"), "reason": "peer …aaa is gone", "commits": [60],
        },
    ]  # fmt: skip
    stayed = vnode_history(check_log(log.network_id, log.entries), "fc2")
    assert [(row["host"], row["from"]) for row in stayed] == [(peer("b"), None)] * 2


def test_a_networks_history_has_every_entry_and_what_moved() -> None:
    log = a_takeover(keepers="xyz")
    rows = network_history(check_log(log.network_id, log.entries))
    assert [(row["kind"], row.get("step")) for row in rows] == [
        ("claim", None), ("commit", 20), ("commit", 40), ("claim", None), ("commit", 60),
    ]  # fmt: skip
    moved = rows[3]["moved"]
    assert {move["vnode"] for move in moved} == set(GRAPH.vnodes()) - {"fc2"}
    assert {(move["from"], move["to"]) for move in moved} == {(peer("a"), peer("c"))}
    assert rows[3]["hosts"] == sorted([peer("b"), peer("c")])


def test_the_end_is_shown() -> None:
    log = a_takeover(keepers="xyz")
    log.close("p")
    last = network_history(check_log(log.network_id, log.entries))[-1]
    assert (last["kind"], last["counts"]) == ("closing", True)
    assert last["reason"] == "ended by its owner: enough"


def test_what_does_not_count_is_shown_with_the_reason() -> None:
    """In a store an entry stands there though it does not count."""
    log = a_takeover(state_url="file:///x")
    states = {VNODE: common_pb2.BlobRef(digest=b"x" * 32)}
    stale = new_commit(log.history, keypair_of("o"), 80, states)
    why = log.history.add(stale)
    assert "signed by" in why
    log.commit("p", 80)
    checked = check_log(log.network_id, log.entries)
    rows = vnode_history(checked, VNODE)
    assert [(row["kind"], row["counts"]) for row in rows] == [
        ("claim", True), ("claim", True), ("commit", False),
    ]  # fmt: skip
    assert rows[2]["void"] == why
    assert rows[2]["orchestrator"] == peer("o")
    assert rows[1]["commits"] == [60, 80]
    assert [row["counts"] for row in network_history(checked)] == [True] * 5 + [False, True]


def test_a_void_claim_moves_nothing() -> None:
    log = Log(GRAPH, granted=["o", "p"], state_url="file:///x")
    log.add(log.proposal("o", FIRST))
    robber = new_claim(
        log.history, keypair_of("robber"), log.manifest, placement=dict.fromkeys(FIRST, peer("z"))
    )
    assert "does not let" in log.history.add(robber)
    log.add(log.proposal("p", SECOND))
    rows = vnode_history(check_log(log.network_id, log.entries), VNODE)
    assert [(row["host"], row["from"], row["counts"]) for row in rows] == [
        (peer("a"), None, True), (peer("z"), None, False), (peer("c"), peer("a"), True),
    ]  # fmt: skip


def forged(signed: common_pb2.Signed) -> common_pb2.Signed:
    return common_pb2.Signed(
        payload=signed.payload, public_key=signed.public_key, signature=bytes(64)
    )


def of_another_log(signed: common_pb2.Signed) -> common_pb2.Signed:
    other = Log(GRAPH, keepers="xyz", nonce=b"another")
    return other.claim("o", FIRST)


@pytest.mark.parametrize(("spoil", "signature_ok"), [(forged, False), (of_another_log, True)])
def test_an_entry_that_does_not_hold_ends_the_history(spoil: Any, signature_ok: bool) -> None:
    log = a_takeover(keepers="xyz")
    entries = list(log.entries)
    entries[3] = spoil(entries[3])
    rows = network_history(check_log(log.network_id, entries))
    assert [row["counts"] for row in rows] == [True, True, True, False]
    assert rows[3]["signature_ok"] is signature_ok
    assert rows[3]["void"]


def test_what_is_no_entry_is_malformed() -> None:
    log = a_takeover(keepers="xyz")
    junk = keypair_of("o").sign(keys.LOG_ENTRY, b"\xff")
    with pytest.raises(MalformedError):
        check_log(log.network_id, [junk])


class Told:
    """A session whose node knows one network."""

    def __init__(self, log: Log, where: list[control_pb2.WhereIsRow] | None = None) -> None:
        self._log = log
        self._where = where or []
        self.readable = True

    async def find(self, name: str) -> NetworkInfo:
        if name != "small":
            raise NotFoundError(f"there is no network {name!r} here")
        return NetworkInfo(self._log.network_id, "small", peer("p"), GRAPH.vnodes(), 2, "")

    async def control(self, method: str, request: Any, reply_type: Any) -> Any:
        assert method == "ReadLog"
        if not self.readable:
            raise UnreachableError("no majority of the keepers answers")
        return control_pb2.LogReply(entries=self._log.entries)

    async def where_is(self, network: Any, vnodes: Any) -> list[control_pb2.WhereIsRow]:
        return self._where


def ask(session: Any, text: str) -> dict[str, Any]:
    return asyncio.run(explain(session, text))


def test_now_is_what_the_dht_and_the_last_commit_say() -> None:
    row = control_pb2.WhereIsRow(vnode=VNODE, peer_id=peer("c"), epoch=2, expires_in_s=30.0)
    shown = ask(Told(a_takeover(keepers="xyz"), [row]), f"small/{VNODE}")
    assert list(shown) == ["network_id", "name", "vnode", "history", "now"]
    assert shown["now"] == {
        "host": peer("c"),
        "epoch": 2,
        "expires_in_s": 30.0,
        "committed_step": 60,
        "state_digest": bytes(32).hex(),
    }
    assert json.loads(json.dumps(shown)) == shown


def test_before_the_first_commit_and_without_a_record() -> None:
    log = Log(GRAPH, keepers="xyz")
    log.claim("o", FIRST)
    now = ask(Told(log), f"small/{VNODE}")["now"]
    assert now == dict.fromkeys(("host", "epoch", "expires_in_s", "committed_step", "state_digest"))


@pytest.mark.parametrize("text", ["nobody", "nobody/fc1", "small/nothing", "small/fc1/fc2"])
def test_what_is_not_there_is_said(text: str) -> None:
    with pytest.raises(NotFoundError):
        ask(Told(a_takeover(keepers="xyz")), text)


def test_a_log_that_cannot_be_read_is_said() -> None:
    session = Told(a_takeover(keepers="xyz"))
    session.readable = False
    with pytest.raises(UnreachableError, match="keepers"):
        ask(session, "small")


class Client:
    """What `connect` gives a verb."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, coro: Any) -> Any:
        return asyncio.run(coro)


@pytest.mark.parametrize("of", ["small", f"small/{VNODE}"])
def test_people_read_a_table(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = a_takeover(state_url="file:///x")
    log.history.add(log.proposal("robber", FIRST, reason="\x1b[31mmine"))
    verb = importlib.import_module("p2pnet.cli.explain")  # the package has the verb by that name
    monkeypatch.setattr(verb, "connect", lambda data_dir, bootstrap: Client(Told(log)))
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(verb.explain, [of], catch_exceptions=False)
    assert done.exit_code == 0
    assert log.network_id in done.output
    for said in ("submitted", "peer …aaa is gone", keys.short(peer("p")), "60"):
        assert said in done.output
    assert "\x1b" not in done.output
    as_json = CliRunner().invoke(verb.explain, [of, "--json"], catch_exceptions=False)
    assert json.loads(as_json.output) == ask(Told(log), of)
