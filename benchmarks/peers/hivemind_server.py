"""A hivemind Server with Linear experts. Runs in hivemind's own environment.

    hivemind_server.py EXPERTS WIDTH HANDLERS OPTIMIZER LR

Not through NAT probing or relays, which loopback has no use for.
"""

from __future__ import annotations

import sys
from functools import partial

import talk
import torch
from hivemind.moe.server import Server
from hivemind.moe.server.layers import register_expert_class


@register_expert_class("linear", lambda batch_size, hidden: torch.empty(batch_size, hidden))
class Linear(torch.nn.Linear):
    """One Linear of the width that is asked for."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, hidden)


def main(experts: str, width: str, handlers: str, optimizer: str, lr: str) -> None:
    """Serves until its driver is gone."""
    torch.set_num_threads(1)  # as a p2pnet node computes
    server = Server.create(
        expert_uids=[f"linear.{n}" for n in range(int(experts))],
        expert_cls="linear",
        hidden_dim=int(width),
        num_handlers=int(handlers),
        optim_cls=partial(getattr(torch.optim, optimizer), lr=float(lr)),
        device="cpu",
        start=True,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        auto_nat=False,
        nat_port_map=False,
        use_relay=False,
    )
    try:
        talk.say(addrs=[str(addr) for addr in server.dht.get_visible_maddrs()])
        while talk.listen():
            talk.say()
    finally:
        server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
