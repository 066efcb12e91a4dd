# SPDX-License-Identifier: Apache-2.0
"""A trial of the trainability map: one training, and what its arm adds to the loss."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is added to the loss of a trial.

    Attributes:
        strength: the strength of LBE; 0 for none.
        alpha: the entropy to reach at first; None for the default of `add_lbe`.
        trained: whether alpha is trained.
        until: the step from which on the strength is 0; 0 for never.
        cosine: whether the strength falls to 0 along half a cosine.
        variant: of `LBERegularizer`.
    """

    strength: float = 0.1
    alpha: float | None = None
    trained: bool = True
    until: int = 0
    cosine: bool = False
    variant: str = "entropy"


ARMS = {
    "none": Arm(strength=0.0),
    "lbe": Arm(),
    "lbe_alpha_3": Arm(alpha=3.0),
    "lbe_alpha_0.5": Arm(alpha=0.5),
    "lbe_strength_1": Arm(strength=1.0),
    "lbe_strength_0.01": Arm(strength=0.01),
    "lbe_fixed_alpha": Arm(trained=False),
    "lbe_until_50": Arm(until=50),
    "lbe_until_200": Arm(until=200),
    "lbe_cosine": Arm(cosine=True),
    "lbe_one_sided": Arm(variant="one_sided"),
    "lbe_units": Arm(variant="units"),
    "lbe_std_hinge": Arm(variant="std_hinge"),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training: what a line of the map's CSV begins with.

    Attributes:
        model, norm: as of `lbe-ops train`; a model with a label for each sample.
        gain: factor of the initial hidden kernels.
        arm: a name of `ARMS`.
    """

    activation: str
    initializer: str
    depth: int
    learning_rate: float
    arm: str
    seed: int
    data: str = "digits"
    model: str = "dense"
    norm: str = "none"
    width: int = 64
    batch_size: int = 128
    steps: int = 1200
    gain: float = 1.0
    epsilon: float = 1e-7
    global_clipnorm: float = 1.0

    def graph(self) -> tuple[Any, ...]:
        """What trials must have in common to be run by one `Trainer`."""
        return (
            *(self.data, self.model, self.norm, self.activation),
            *(self.depth, self.width, self.batch_size),
            *(self.epsilon, self.global_clipnorm, ARMS[self.arm].variant),
        )

    def cost(self) -> float:
        """About how many seconds it takes on a core; measured on an AMD EPYC."""
        return (
            6.4e-9
            * (self.steps + 50)
            * (self.depth + 2)
            * self.batch_size
            * (self.width + 50)
        )
