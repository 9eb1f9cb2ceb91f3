"""Print the coefficients of `gelu_tail` in kernels/star.py: log2 Phi(n) = -1 + n (c1 + n (c2 + ...)) for n <= 0.

    python scripts/fit_gelu.py

Phi's absolute error is what counts, so the error of its logarithm is weighted with Phi itself. Least squares become the
minimax fit by Lawson's iteration: where the error is large, weights grow. Below the fitted range the polynomial
has to stay under the logarithm, so that nothing comes back from zero; the script fails where it does not.
"""

from __future__ import annotations

import numpy as np
import torch

DEGREE, LOW = 8, -6.0  # Phi(-6) = 1e-9


def log2_phi(n: np.ndarray) -> np.ndarray:
    """The logarithm to base 2 of the normal distribution, float64."""
    return (torch.special.log_ndtr(torch.from_numpy(n)) / np.log(2)).numpy()


def polynomial(coefficients: np.ndarray, n: np.ndarray) -> np.ndarray:
    """-1 + c1 n + c2 n^2 + ..."""
    return -1 + sum(c * n ** (k + 1) for k, c in enumerate(coefficients))


def fit() -> np.ndarray:
    """c1 ... of the least largest error of Phi on [LOW, 0]; powers of n / LOW, as those of n would be too unequal."""
    share = (1 - np.cos(np.linspace(0, np.pi, 241)[1:])) / 2
    target = log2_phi(LOW * share) + 1
    powers = share[:, None] ** np.arange(1, DEGREE + 1)
    weight, lawson = 2.0 ** (target - 1), np.ones_like(share)
    for _ in range(200):
        w = weight * np.sqrt(lawson)
        coefficients = np.linalg.lstsq(powers * w[:, None], target * w, rcond=None)[0]
        lawson *= np.abs(weight * (powers @ coefficients - target))
        lawson = np.maximum(lawson / lawson.max(), 1e-30)
    return coefficients / LOW ** np.arange(1, DEGREE + 1)


def main() -> None:
    coefficients = np.array([float(f"{c:.9g}") for c in fit()])
    n = np.linspace(LOW, 0, 20001)
    error = np.abs(2.0 ** polynomial(coefficients, n) - 2.0 ** log2_phi(n)).max()
    beyond = np.linspace(-16, LOW, 2001)
    assert (polynomial(coefficients, beyond) <= log2_phi(beyond)).all()
    print(*(f"{c:.9g}" for c in coefficients), sep="\n")
    print(f"largest error of Phi: {error:.2g}")


if __name__ == "__main__":
    main()
