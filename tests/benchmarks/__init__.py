"""Benchmarks against bars: what the distributed path costs, how soon it starts, how fast it reads (`make bench`)."""
