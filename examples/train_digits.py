"""Trains a torch model on real handwritten digits in a swarm that is already running.

    python examples/train_digits.py                             # through the node on this machine
    python examples/train_digits.py --bootstrap FILE|MULTIADDR  # without a node of one's own

Prints the test accuracy and where each VNode lives.
"""

import argparse
from collections import OrderedDict

from torch import nn

import p2pnet
from p2pnet.data.datasets import batches, open_data

parser = argparse.ArgumentParser()
parser.add_argument("--bootstrap", default=(), help="a list of peers, or one multiaddr")
parser.add_argument("--data-dir", help="of the local node; default: ~/.p2pnet")
parser.add_argument("--name", default="digits-example", help="of the network: each name once")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()

layers = [("fc1", nn.Linear(64, 128)), ("act1", nn.ReLU()), ("norm", nn.LayerNorm(128))]
model = nn.Sequential(OrderedDict([*layers, ("out", nn.Linear(128, 10))]))
x, y = open_data("digits:train")
x_test, y_test = open_data("digits:test")

with p2pnet.Client(options.bootstrap, data_dir=options.data_dir) as client:
    net = client.submit(model, name=options.name, optimizer={"type": "Adam", "lr": 1e-3})
    net.train(
        lambda epoch: batches(x, y, batch_size=32, seed=0, epoch=epoch),
        epochs=options.epochs,
        on_epoch=lambda row: print(f"epoch {row['epoch']}: loss {row['loss']:.4f}"),
    )
    print(f"test accuracy {(net(x_test).argmax(axis=1) == y_test).mean():.4f}")
    for place in net.locate():
        print(f"{place['vnode']:5} lives on {place['peer_id']}")
    model.load_state_dict(net.state_dict())  # the trained weights, back in plain torch
