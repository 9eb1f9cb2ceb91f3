"""The gate that ends an attention: u * conv1x1(x)."""

from suite import benchmark_of

test_pointwise_gate = benchmark_of("pointwise_gate")
