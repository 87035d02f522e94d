"""Direct preference optimisation on the best and the worst sample of each group.

    loss = -log sigmoid(-dpo_beta / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)])

with the error e of `flow_matching` at the same noise and level for the best sample w and the worst l (Diffusion-DPO,
arXiv 2311.12908; Flow-DPO, arXiv 2501.13918).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflowgrpo.config import Config
from fastflowgrpo.learning.flow_matching import NoisedObjective
from fastflowgrpo.learning.objective import Batch, Statistics
from fastflowgrpo.learning.regression import best_and_worst
from fastflowgrpo.scoring.contract import Scores


class DPO(NoisedObjective):
    """Diffusion-DPO. A pair has the best sample of a group as its row, and stands for the best and the worst."""

    one_pair_per_group = True
    uses_reference = True

    @classmethod
    def samples_per_pair(cls, config: Config) -> int:
        return 2

    def advantages(self, scores: Scores, reward_weights: Mapping[str, float]) -> Tensor:
        """1 for the best sample of a group, -1 for the worst, 0 for the others and in groups of equal rewards."""
        groups = scores.values.double().view(-1, self.group_size)
        return best_and_worst(groups).masked_fill(groups.isnan(), math.nan).flatten()

    def is_trained(self, advantages: Tensor) -> Tensor:
        return advantages > 0

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        group = rows // self.group_size
        worst = self.group_size * group + batch.advantages.view(-1, self.group_size)[group].nan_to_num().argmin(1)
        both, slots = torch.cat([rows, worst]), torch.cat([slots, slots])
        noisy = self.add_noise(batch, both, slots, noise_rows=torch.cat([rows, rows]))
        with torch.no_grad(), self.policy.reference():
            reference = noisy.error(noisy.velocity(self.policy))
        errors = noisy.error(noisy.velocity(self.policy))
        fall_best, fall_worst = (reference - errors).chunk(2)
        margin = fall_best - fall_worst
        loss = -F.logsigmoid(self.config.update.dpo_beta / 2 * margin)
        statistics = {
            "loss": loss,
            "dpo_accuracy": margin > 0,
            "dpo_fall_best": fall_best,
            "dpo_fall_worst": fall_worst,
        }
        return loss, {name: value.detach().float() for name, value in statistics.items()}
