"""Print the coefficients of the polynomials that stand for the normal distribution in GELU.

    python scripts/fit_gelu.py

`gelu_tail` of kernels/star.py, for Triton: log2 Phi(n) = -1 + n (c1 + n (c2 + ...)) for n <= 0. `gelu` of
csrc/cpu/isa/gelu.h, without AVX-512: (2 P(X > t))^(1/8) = 1 + t (c1 + t (c2 + ...)) for 0 <= t <= 5.5.

The absolute error of the distribution is what counts, so the error of what is fitted is weighted with the derivative of
the distribution by it. Least squares become the minimax fit by Lawson's iteration: where the error is large, weights
grow. Below its range the logarithm's polynomial has to stay under the logarithm, so that nothing comes back from zero;
the script fails where it does not.
"""

from __future__ import annotations

import numpy as np
import torch

LOG_DEGREE, LOW = 8, -6.0  # Phi(-6) = 1e-9
ROOT_DEGREE, HIGH = 8, 5.5


def minimax(powers: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The coefficients of the least largest |weight (powers @ coefficients - target)|."""
    lawson = np.ones_like(target)
    for _ in range(200):
        w = weight * np.sqrt(lawson)
        coefficients: np.ndarray = np.linalg.lstsq(powers * w[:, None], target * w, rcond=None)[0]
        lawson *= np.abs(weight * (powers @ coefficients - target))
        lawson = np.maximum(lawson / lawson.max(), 1e-30)
    return coefficients


def lower_tail(n: np.ndarray) -> np.ndarray:
    """The logarithm to base 2 of the normal distribution, float64."""
    return (torch.special.log_ndtr(torch.from_numpy(n)) / np.log(2)).numpy()


def chebyshev(points: int) -> np.ndarray:
    """From 0 to 1, dense at the ends."""
    return (1 - np.cos(np.linspace(0, np.pi, points))) / 2


def fit_log() -> np.ndarray:
    """c1 ... of the logarithm on [LOW, 0]; powers of n / LOW, as those of n would be too unequal."""
    share = chebyshev(241)[1:]
    exponent = np.arange(1, LOG_DEGREE + 1)
    target = lower_tail(LOW * share) + 1
    return minimax(share[:, None] ** exponent, target, 2.0 ** (target - 1)) / LOW**exponent


def fit_root() -> np.ndarray:
    """c1 ... of the eighth root on [0, HIGH]; at large t GELU multiplies the error with t."""
    share = chebyshev(481)[1:]
    exponent = np.arange(1, ROOT_DEGREE + 1)
    tail = 2.0 ** lower_tail(-HIGH * share)
    allowed = np.minimum(1, tail + 1 / (2 * HIGH * share + 1))
    root = (2 * tail) ** 0.125
    return minimax(share[:, None] ** exponent, root - 1, 4 * root**7 / allowed) / HIGH**exponent


def rounded(coefficients: np.ndarray) -> np.ndarray:
    """As they are printed."""
    return np.array([float(f"{c:.9g}") for c in coefficients])


def print_fit(name: str, coefficients: np.ndarray, error: float) -> None:
    """One coefficient a line."""
    print(f"{name}, largest error of the distribution {error:.2g}:")
    print(*(f"{c:.9g}" for c in coefficients), sep="\n")


def main() -> None:
    log = rounded(fit_log())
    exponent = np.arange(1, LOG_DEGREE + 1)
    n = np.linspace(LOW, 0, 20001)
    error = np.abs(2.0 ** (n[:, None] ** exponent @ log - 1) - 2.0 ** lower_tail(n)).max()
    beyond = np.linspace(-16, LOW, 2001)
    assert (beyond[:, None] ** exponent @ log - 1 <= lower_tail(beyond)).all()
    print_fit("logarithm (kernels/star.py)", log, error)

    root = rounded(fit_root())
    t = np.linspace(0, HIGH, 20001)
    exponent = np.arange(1, ROOT_DEGREE + 1)
    error = np.abs((1 + t[:, None] ** exponent @ root) ** 8 / 2 - 2.0 ** lower_tail(-t)).max()
    print_fit("eighth root (csrc/cpu/isa/gelu.h)", root, error)


if __name__ == "__main__":
    main()
