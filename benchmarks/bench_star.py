"""The star: outer(activation(a) * b)."""

from suite import benchmark_of

test_star = benchmark_of("star")
