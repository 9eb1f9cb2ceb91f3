"""A strip chain multiplied by a gate."""

from suite import benchmark_of

test_gated_strip_conv_chain = benchmark_of("gated_strip_conv_chain")
