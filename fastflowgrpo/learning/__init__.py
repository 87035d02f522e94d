"""What an epoch's images teach: advantages, one file per objective, and the optimiser updates.

Sampling, scoring and logging are elsewhere; nothing here knows where images or scores come from.
"""

from fastflowgrpo.learning.forward_process import AWM, DGPO, NFT
from fastflowgrpo.learning.objective import Batch, Objective
from fastflowgrpo.learning.policy_gradient import GRPO, GRPOGuard
from fastflowgrpo.learning.preference import DPO
from fastflowgrpo.learning.regression import RWR, SFT

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GRPO,
    "grpo_guard": GRPOGuard,
    "nft": NFT,
    "awm": AWM,
    "dgpo": DGPO,
    "dpo": DPO,
    "sft": SFT,
    "rwr": RWR,
}
"""The objective of each `update.algorithm`."""

__all__ = ["OBJECTIVES", "Batch", "Objective"]
