"""The 1x1 convolution, alone and with its activation."""

from suite import benchmark_of

test_pointwise_conv2d = benchmark_of("pointwise_conv2d")
