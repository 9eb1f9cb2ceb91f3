"""SDM's star convolution: GELU(DW(PW1 LN(x))) * PW2 LN(x)."""

from suite import benchmark_of

test_star_conv = benchmark_of("star_conv")
