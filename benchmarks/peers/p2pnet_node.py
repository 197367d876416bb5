"""A p2pnet node that says in its advert that gRPC is reached somewhere else: at a proxy.

python -m benchmarks.peers.p2pnet_node ADVERTISED_PORT JOIN_OPTIONS...
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from p2pnet.cli import main

if __name__ == "__main__":
    advertised = (f"127.0.0.1:{sys.argv.pop(1)}",)
    sys.argv.insert(1, "join")
    with patch("p2pnet.node._targets", lambda addrs, grpc: advertised):  # there is no option
        main()
