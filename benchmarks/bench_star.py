"""Verify and time the star: outer(activation(a) * b)."""

from __future__ import annotations

import sys

from measuring import Subject, main_for
from sdan_fast import functional, reference

# Forward reads a and b and writes y; backward reads the gradient, a and b, and writes two gradients.
SUBJECT = Subject(
    name="star",
    make=lambda draw, shape: [draw(*shape), draw(*shape)],
    run=functional.star,
    plain=reference.star,
    forward_tensors=3,
    backward_tensors=5,
)

if __name__ == "__main__":
    sys.exit(main_for(SUBJECT))
