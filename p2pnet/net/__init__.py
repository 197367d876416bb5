"""The doors: libp2p, gRPC, TLS, and the bridge between the two event loops."""

import os

# gRPC's core writes to stderr of its own accord; it reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
