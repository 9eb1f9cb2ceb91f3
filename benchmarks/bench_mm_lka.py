"""The large-kernel attention, with every number of branches."""

from suite import benchmark_of

test_mm_lka = benchmark_of("mm_lka")
