"""The controls of the evidence: freezing at random, and a network without depthwise convolutions.

    python -m tools.controls --method random --bits 3 --act-bits 32       all flags of train.py
    python -m tools.controls --model mobilenet_v2_short_dense --method lsq --bits 3

Random freezing: each time a weight passes f_th, another one, picked at random, freezes at its own
round(EMA). So about as many weights freeze, about as early, but not those that oscillate.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

import train
from osc_qat import OscillationTracker


class RandomFreezing(OscillationTracker):
    """A tracker that freezes as many weights as pass f_th for the first time, but others.

    seed: for the choice of weights. Choice number k depends on the seed and k alone. The state
    keeps k and which weights have passed, so a resumed run picks the same weights.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.001, seed: int = 0):
        super().__init__(model, momentum)
        self.seed, self.choices = seed, torch.zeros(1, dtype=torch.int64)
        self.passed = torch.zeros_like(self.f)  # 1 if f has passed f_th before

    def _freeze(self, above: Tensor, w_int: Tensor) -> Tensor:
        new = above & (self.passed == 0)
        self.passed.masked_fill_(new, 1)
        candidates = torch.cat([(layer.frozen == 0).flatten() for layer in self.layers.values()])
        candidates = (candidates & ~new).nonzero().flatten().cpu()
        random = train.generator("random freezing", self.seed, self.choices.item())
        order = torch.randperm(len(candidates), generator=random)
        picked = torch.zeros_like(above)
        picked[candidates[order[:int(new.sum())]]] = True
        self.choices += 1
        return super()._freeze(picked, w_int)

    def state_dict(self) -> dict[str, Tensor]:
        """The tracker's state, the number of choices, and by layer which weights have passed."""
        passed = {f"{name}.passed": mask for name, mask in self._by_name(self.passed).items()}
        return super().state_dict() | passed | {"choices": self.choices.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for a state of other layers or momentum; the tracker is as it was."""
        super().load_state_dict(state)
        self.passed.copy_(self._gather(state[f"{name}.passed"] for name in self.layers))
        self.choices.copy_(state["choices"])


def dense_residual(*args, **options) -> nn.Module:
    """MobileNetV2's block with a dense 3x3 convolution in the place of the depthwise one."""
    block = InvertedResidual(*args, **options)
    width, stride = block.conv[-3][0].in_channels, block.conv[-3][0].stride
    block.conv[-3][0] = nn.Conv2d(width, width, 3, stride, 1, bias=False)
    return block


# As many layers as the short MobileNetV2 and about as many parameters: its blocks widen 1.2 times.
DENSE = {"mobilenet_v2_short_dense":
         partial(train.mobilenet_v2_short, expansion=1.2, block=dense_residual)}


def add_controls() -> None:
    """Adds the method "random" and the dense network to train.py's tables."""
    train.METHODS["random"] = train.METHODS["freeze"] | dict(tracker=RandomFreezing)
    train.NETWORKS.update(DENSE)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of train.py; random freezing takes its seed from --seed."""
    add_controls()
    args = train.parse(argv)
    train.METHODS["random"]["tracker"] = partial(RandomFreezing, seed=args.seed)
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.controls", parse, train.work, argv)


if __name__ == "__main__":
    train.run_script(main)
