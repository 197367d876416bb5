"""One peer of each system, as a process that is driven over a pipe."""
