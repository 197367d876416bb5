"""A network's log: what order is decided in, and where it is kept (DESIGN D6)."""
