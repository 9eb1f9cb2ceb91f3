"""What can be known of the GPU kernels without a GPU: registers, occupancy, disassembly, counts and a model of time.

devices and occupancy are plain arithmetic, sass reads disassemblies, triton_kernels and cuda_kernels find the kernels,
counts executes PTX, modelled_time turns it all into times that are always labelled as modelled, and table keeps the
committed results that CI compares with.
"""
