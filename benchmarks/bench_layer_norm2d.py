"""LayerNorm over channels at each pixel."""

from suite import benchmark_of

test_layer_norm2d = benchmark_of("layer_norm2d")
