"""Teaching the model not to loop: blocks that repeat themselves, and a loss that fades repetitions.

A small model trained on likelihood alone repeats itself when it decodes greedily, because every
repetition makes the next one more likely. As in DITTO (Xu et al. 2022, "Learning to Break the
Loop", section 4) the model is shown artificial loops, a stretch of a real text repeated to the end
of the block, and is to find each token at most `FADING` times as probable as one repetition
earlier. DITTO's own loss hardly has a gradient where the model is sure of a repetition, which is
the case that matters; unlikelihood (Welleck et al. 2020) has its greatest there, so that is the
loss until the wanted ratio is reached. Nothing is decoded: it costs no more than its blocks.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

FADING = 0.4
"""Greatest wanted ratio of a token's probability to its probability one repetition earlier."""

LONGEST_PERIOD = 64

IGNORED = -1
"""In place of an `earlier` index: this target does not count."""


def no_repetition(window_BT: Tensor) -> Tensor:
    """The `earlier` index for a batch without artificial loops: every target points to itself."""
    blocks, length = window_BT.shape[0], window_BT.shape[1] - 1
    return torch.arange(length).expand(blocks, length).contiguous()


def add_loops(
    window_BT: Tensor, share: float, line_ends: frozenset[int], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Turn the first blocks of a batch into artificial loops.

    Args:
        window_BT: token ids, shape [B, T + 1].
        share: share of the blocks to turn.
        line_ends: tokens with a line feed; half of the repeated stretches go from one to the next.
        rng: decides where the loops begin and, for the other half, their period, 1 to 64 tokens.

    Returns:
        The new window, and `earlier`, shape [B, T], int64: for each target the index of the target
        one repetition before, or its own index where it repeats nothing.
    """
    window, earlier = window_BT.clone(), no_repetition(window_BT)
    length = window.shape[1]
    for row in range(round(share * window.shape[0])):
        ids = window[row].tolist()
        start = rng.randint(8, length // 2)
        period = round(math.exp(rng.uniform(0.0, math.log(LONGEST_PERIOD))))
        ends = [i for i, token in enumerate(ids[: length * 3 // 4]) if i and token in line_ends]
        if rng.random() < 0.5 and len(ends) > 1:
            line = rng.randrange(len(ends) - 1)
            start, period = ends[line] + 1, ends[line + 1] - ends[line]
        period = min(period, length - 1 - start)
        for i in range(start + period, length):
            ids[i] = ids[i - period]
        window[row] = torch.tensor(ids)
        first = start + period - 1
        earlier[row, first:] -= period
    return window, earlier


def faded_loss(nats_BT: Tensor, earlier_BT: Tensor) -> Tensor:
    """Mean loss over the counted targets: likelihood or, for repetitions, unlikelihood.

    Args:
        nats_BT: -log p of each target, shape [B, T].
        earlier_BT: see `add_loops`.

    Returns:
        A scalar. A repetition's loss is -log(1 - p) while p > FADING * p_earlier, and then zero.
    """
    p = torch.exp(-nats_BT)
    wanted = FADING * p.detach().gather(1, earlier_BT.clamp(min=0))
    fading = torch.where(p > wanted, -torch.log(1 - p + 1e-6), 0.0)
    own = torch.arange(nats_BT.shape[1])
    losses = torch.where(earlier_BT == own, nats_BT, fading)
    counted = earlier_BT != IGNORED
    return torch.where(counted, losses, 0.0).sum() / counted.sum()
