"""The contract that every op's other backends are held to, for Triton under its interpreter: the star in full."""

from tests.ops.test_star import TestStar, test_any_rank, test_refusals

__all__ = ["TestStar", "test_any_rank", "test_refusals"]
