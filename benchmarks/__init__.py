"""`make bench`: p2pnet's DHT beside hivemind's and py-libp2p's; see docs/benchmarks.md."""
