"""The runners of the benchmark, one interface for all (`bench.peers.runner`)."""
