"""The Python client: submit, train, ask and fetch networks.

with p2pnet.Client(bootstrap="bootstrap_peers.txt") as client:
    net = client.submit(model, name="digits", loss="CrossEntropyLoss",
                        optimizer={"type": "Adam", "lr": 1e-3})
    net.train(loader, epochs=3)
    y = net(x)
"""

from p2pnet.client.api import Client, Network

__all__ = ["Client", "Network"]
