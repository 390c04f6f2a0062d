"""Pearson's chi-square test with its power, from torch's incomplete gamma function.

A test of losslessness must say how often it rejects a correct sampler (the false-alarm rate), and
how surely it notices a wrong one at the same sample size (the power).
"""

import dataclasses

import torch
from torch import Tensor

# P(rejecting a correct sampler); the seeds are fixed, so it was drawn once for each test.
FALSE_ALARM = 1e-4


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """The outcome of a test.

    Attributes:
        statistic: sum over the cells of (observed - expected)^2 / expected.
        degrees: of freedom, the cells minus 1.
    """

    statistic: float
    degrees: int

    @property
    def p_value(self) -> float:
        """P(a correct sampler has this statistic or a larger one)."""
        return _survival(self.statistic, self.degrees)

    @property
    def rejected(self) -> bool:
        """Whether the sampler is called wrong, at the rate of ``FALSE_ALARM``."""
        return self.p_value < FALSE_ALARM

    @property
    def power(self) -> float:
        """P(the test rejects), for a sampler that is as wrong as this one seems to be.

        The statistic of a wrong sampler is about a noncentral chi-square, whose mean is degrees +
        noncentrality; and that is a Poisson mixture of chi-squares.
        """
        noncentrality = max(self.statistic - self.degrees, 0.0)
        low, high = float(self.degrees), 10.0 * self.degrees + 200.0
        for _ in range(80):  # the critical value
            middle = (low + high) / 2
            low, high = (
                (middle, high) if _survival(middle, self.degrees) > FALSE_ALARM else (low, middle)
            )
        terms = torch.arange(int(noncentrality / 2 + 20 * noncentrality**0.5 + 50)).double()
        rate = torch.tensor(noncentrality / 2, dtype=torch.float64)
        weights = (torch.xlogy(terms, rate) - rate - torch.lgamma(terms + 1)).exp()
        tails = torch.special.gammaincc(
            self.degrees / 2 + terms, torch.tensor(high / 2, dtype=torch.float64)
        )
        return min(float((weights * tails).sum()), 1.0)


def chi_square(cells: Tensor, probabilities: Tensor) -> ChiSquare:
    """Compares samples with a distribution.

    Args:
        cells: int64 ``[N]``, the cell of each sample.
        probabilities: float64 ``[C]``. Cells that fewer than 5 samples are expected in are pooled;
            a sample in a cell of probability zero makes the statistic infinite.
    """
    expected = probabilities.double() * len(cells)
    observed = torch.bincount(cells, minlength=len(expected)).double()
    if bool((observed[expected == 0] > 0).any()):
        return ChiSquare(float("inf"), 1)
    large = expected >= 5
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    observed = torch.cat([observed[large], observed[~large].sum()[None]])
    used = expected > 0
    difference = (observed - expected)[used]
    return ChiSquare(float((difference**2 / expected[used]).sum()), int(used.sum()) - 1)


def _survival(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))
