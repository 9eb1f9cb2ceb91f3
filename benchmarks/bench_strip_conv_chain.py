"""Chains of strips: 1xk, kx1, then the same dilated."""

from suite import benchmark_of

test_strip_conv_chain = benchmark_of("strip_conv_chain")
