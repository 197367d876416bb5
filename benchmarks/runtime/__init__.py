"""The VNode runtime beside hivemind, plain torch, bare gRPC and TCP; docs/performance.md."""
