"""Who asks a hivemind Server's experts: RemoteExpert. Runs in hivemind's own environment.

hivemind_client.py EXPERTS WIDTH SAMPLES ADDR...
"""

from __future__ import annotations

import sys
import time

import talk
import timing
import torch
from hivemind.dht import DHT
from hivemind.moe import RemoteExpert
from hivemind.moe.server import get_experts

_FOUND_S = 30.0


def _find(dht: DHT, uids: list[str]) -> list[RemoteExpert]:
    """A server tells the DHT of its experts a little after it has started."""
    until = time.monotonic() + _FOUND_S
    while True:
        experts = get_experts(dht, uids)
        if None not in experts:
            return list(experts)
        if time.monotonic() > until:
            raise TimeoutError("the server's experts are not in the DHT")
        time.sleep(0.1)


def main(experts: str, width: str, samples: str, *addrs: str) -> None:
    """Asks what it is told to until its driver is gone."""
    torch.set_num_threads(1)
    dht = DHT(
        initial_peers=list(addrs),
        start=True,
        client_mode=True,
        auto_nat=False,
        nat_port_map=False,
        use_relay=False,
    )
    found = _find(dht, [f"linear.{n}" for n in range(int(experts))])
    x, y = torch.randn(2, int(samples), int(width))

    def forward() -> None:
        with torch.no_grad():
            found[0](x)

    def train(expert: RemoteExpert = found[0]) -> None:
        torch.nn.functional.mse_loss(expert(x), y).backward()  # type: ignore[no-untyped-call]

    for _ in range(3):
        for expert in found:
            train(expert)
    talk.say(ready=True)
    while command := talk.listen():
        match command["do"]:
            case "forward":
                talk.say(took_ms=timing.each(forward, command["limit_s"]))
            case "train":
                talk.say(took_ms=timing.each(train, command["limit_s"]))
            case "at_once":
                callers = [forward] * command["callers"]
                talk.say(a_second=timing.at_once(callers, command["limit_s"]))
    dht.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
