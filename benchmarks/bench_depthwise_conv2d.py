"""Depth-wise convolutions: strips, squares, dilated ones."""

from suite import benchmark_of

test_depthwise_conv2d = benchmark_of("depthwise_conv2d")
