"""The doors: libp2p, gRPC, TLS, and the bridge between the two event loops."""
