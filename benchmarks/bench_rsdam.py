"""SDAN's whole block."""

from suite import benchmark_of

test_rsdam = benchmark_of("rsdam")
