"""The star distillation module: four levels of star convolutions and a fusion."""

from suite import benchmark_of

test_sdm = benchmark_of("sdm")
