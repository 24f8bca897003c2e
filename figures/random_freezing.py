"""The control of freezing: as many weights freeze, and as early, but others, picked at random.

    python -m figures.random_freezing --method freeze --bits 3 --act-bits 32      flags of train.py

Each time a weight passes f_th, a random one freezes in its place, at its own round(EMA).
"""

import sys

import torch

import train


class RandomFreezing(train.OscillationTracker):
    """A tracker that freezes as many weights as Algorithm 1, but not those that oscillate."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.passed = torch.zeros_like(self.f, dtype=torch.bool)
        self.random = torch.Generator().manual_seed(0)

    def _freeze(self, above, w_int):
        number = int((above & ~self.passed).sum())
        self.passed |= above
        free = torch.cat([(layer.frozen == 0).flatten() for layer in self.layers.values()])
        picked, free = torch.zeros_like(free), free.nonzero()
        picked[free[torch.randperm(len(free), generator=self.random)[:number]]] = True
        return super()._freeze(picked, w_int)


if __name__ == "__main__":
    train.OscillationTracker = RandomFreezing
    sys.exit(train.main())
