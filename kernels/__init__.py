"""The Triton kernels: one module per op, each with `forward`, `backward` and `supports` as plain functions."""
