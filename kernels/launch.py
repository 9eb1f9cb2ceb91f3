"""Every kernel of the package is launched here, so that a test can compile or interpret exactly what would be
launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._triton import interpreting, jit, triton

Launcher = Callable[..., None]
_override: Launcher | None = None


def launch(
    kernel: Any, grid: Sequence[Any], *args: Any, num_warps: int, num_stages: int = 1, **constexprs: Any
) -> None:
    """Launch a kernel over `grid` on the device of its first tensor argument.

    CUDA tensors go through `wrap_triton`, which lets `triton_op` show the kernel to Inductor. Under the Triton
    interpreter the kernel runs on CPU tensors.
    """
    if _override is not None:
        _override(kernel, tuple(grid), *args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    if interpreting(kernel):
        kernel[tuple(grid)](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    first = next(a for a in args if isinstance(a, Tensor))
    run = torch.library.wrap_triton(kernel)[tuple(grid)]
    with _device_guard(first):
        run(*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


@contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Hand every launch in this block to `launcher(kernel, grid, *args, num_warps=, num_stages=, **constexprs)`
    instead.
    """
    global _override
    before, _override = _override, launcher
    try:
        yield
    finally:
        _override = before


@contextmanager
def _device_guard(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's GPU current, which Triton launches on; tensors without data (tracing) need no device."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cuda":
        yield
        return
    if tensor.device.index == torch.cuda.current_device():
        yield
        return
    with torch.cuda.device(tensor.device):
        yield


def unavailable(*tensors: Tensor | None) -> str | None:
    """Why no kernel of this package can take these tensors, or None: Triton, device, dtype, one dtype and device for
    all.
    """
    if triton is None:
        return "triton is not installed"
    present = [t for t in tensors if t is not None]
    x = present[0]
    wanted = "cpu" if interpreting(_probe) else "cuda"
    if _override is None and x.device.type != wanted:
        where = (
            "under TRITON_INTERPRET=1 the tensors must be on the CPU"
            if wanted == "cpu"
            else "it needs CUDA tensors"
        )
        return f"{where}, got {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {x.dtype} has no Triton kernel (float32, bfloat16 and float16 have)"
    for t in present:
        if t.device != x.device:
            return f"the tensors are on different devices, {x.device} and {t.device}"
        if t.dtype != x.dtype:
            return f"the tensors have different dtypes, {x.dtype} and {t.dtype}"
    return None


@jit
def _probe():  # decorated like every kernel here, so it knows whether they are interpreted
    pass


def ceil_div(n: Any, d: int) -> Any:
    """ceil(n / d), also for symbolic sizes."""
    return (n + d - 1) // d


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format of an op's result: contiguous, unless `x` is channels_last and not contiguous."""
    if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def pair(dilation: Sequence[int]) -> tuple[int, int]:
    """(dh, dw) of an `int[2]` argument, which a schema also lets be one int."""
    return (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[-1])


def rows_are_dense(x: Tensor) -> bool:
    """Whether the planes of an N x C x H x W tensor lie as those of a contiguous one; the batch stride is free."""
    _, C, H, W = x.shape
    _, sc, sh, sw = x.stride()
    return (W == 1 or sw == 1) and (H == 1 or sh == W) and (C == 1 or sc == H * W)


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next of a channels_last tensor, or of a slice of its channels."""
    return x.stride(3) if x.shape[3] > 1 else (x.stride(2) if x.shape[2] > 1 else x.shape[1])


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every tensor, and each of its images, starts at a multiple of 16 bytes."""
    return all(
        _base(t) % (16 // t.element_size()) == 0 and t.stride(0) % (16 // t.element_size()) == 0
        for t in tensors
    )


def channel_vector(*tensors: Tensor) -> int:
    """The largest power of two up to 16 bytes by which channels, pixels and images of all these tensors are aligned."""
    v = 16 // tensors[0].element_size()
    while v > 1 and any(n % v for t in tensors for n in (_base(t), t.shape[1], pixel_stride(t), t.stride(0))):
        v //= 2
    return v


def _base(x: Tensor) -> Any:
    """Where a tensor starts, in elements; tracing knows only its place in its storage, which allocators align."""
    if type(x) is Tensor and x.device.type != "meta" and not torch.compiler.is_compiling():
        return x.data_ptr() // x.element_size()
    return x.storage_offset()


def wide_plane(*tensors: Tensor) -> bool:
    """Whether an offset inside one image can exceed 32 bits."""
    return any(t.shape[2] * t.shape[3] * max(t.shape[1], pixel_stride(t)) >= 2**31 for t in tensors)


@dataclass(frozen=True)
class ImageLayout:
    """How kernels address the pixels and channels of tensors that lie alike.

    NCHW: pixels are contiguous, VP divides their number. Else channels are contiguous, and it is stride VC elements
    from pixel to pixel. VP and VC tell the compiler what is aligned.
    """

    NCHW: bool
    VC: int
    VP: int
    stride: int


def image_layout(fmt: torch.memory_format, x: Tensor, *others: Tensor) -> ImageLayout:
    """The layout of dense N x C x H x W tensors of one shape that are contiguous in the memory format `fmt`.

    The format has to be given: an image of one channel is contiguous in both, and follows the tensors beside it.
    """
    _, _, H, W = x.shape
    if fmt == torch.contiguous_format:
        v = 16 // x.element_size() if is_aligned(x, *others) else 1
        while v > 1 and (H * W) % v:
            v //= 2
        return ImageLayout(True, 1, v, 1)
    v = channel_vector(x, *others)
    return ImageLayout(False, v, 1, pixel_stride(x) // v)


def empty_image(like: Tensor, channels: int, fmt: torch.memory_format) -> Tensor:
    """An uninitialised tensor with another number of channels, in the memory format `fmt`."""
    N, _, H, W = like.shape
    return torch.empty((N, channels, H, W), dtype=like.dtype, device=like.device, memory_format=fmt)
