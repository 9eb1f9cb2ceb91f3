"""Rung 1: a whole SDAN under Triton's interpreter, every op of it on `triton`; and launch counts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from triton_harness import assert_bound

import sdan_fast
from sdan_fast.models import SDAN
from sdan_fast.modules import BRANCHES, MMLKA

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
launch_counts = importlib.import_module("launch_counts")

OPS = {"depthwise_conv2d", "layer_norm2d", "mm_lka", "star_conv"}


def results(dtype, backend, model, x):
    """Output and gradients (input, then parameters) of a copy of the model in a dtype on one backend."""
    copy = SDAN(scale=2, channels=16, blocks=1).to(dtype)
    copy.load_state_dict(model.state_dict())
    x = x.to(dtype).requires_grad_()
    with sdan_fast.use_backend(backend):
        y = copy(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in copy.parameters())]


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.slow  # a minute in the interpreter
def test_model(fmt):
    """Values and all gradients against float64 at the error bound; no op of it ran on another backend.

    One block: another one launches the same kernels on images of the same size.
    """
    torch.manual_seed(0)
    model = SDAN(scale=2, channels=16, blocks=1)
    x = torch.rand(1, 3, 5, 8).contiguous(memory_format=fmt)
    exact = results(torch.float64, "reference", model, x)
    eager = results(torch.float32, "reference", model, x)
    counter = launch_counts.LaunchCounter()
    with counter:
        got = results(torch.float32, "triton", model, x)
    names = ["output", "x", *(name for name, _ in model.named_parameters())]
    for name, a, b, c in zip(names, got, eager, exact, strict=True):
        assert_bound(a, b, c, torch.float32, name)
    ran = dict(key.rsplit(".", 1) for key in counter.overloads)
    assert set(ran) == OPS | {f"{op}_backward" for op in OPS}
    assert set(ran.values()) == {"triton"}


@pytest.mark.parametrize("groups", BRANCHES)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(180, 320), (1080, 1920)], ids=str)
def test_attention_is_four_launches_at_most(groups, fmt, size):
    """Also for images whose rows and columns no program can hold; and there is nothing but these launches."""
    x = torch.empty((1, 12, *size), memory_format=fmt)
    attention = MMLKA(12, groups)
    with sdan_fast.use_backend("triton"), launch_counts.counting() as counter, torch.no_grad():
        attention(x)
    assert counter.launches.total() == (4 if groups == 4 else 3)
    assert all(name.startswith("triton::") for name in counter.launches)


def test_launch_counts_are_those_of_the_docs():
    assert launch_counts.table() in (ROOT / "docs" / "triton.md").read_text()
