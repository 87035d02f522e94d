"""Group-relative advantages: the distance of each reward from the mean of its group.

    A = (R - mean of the group) / (std + 1e-4)

Source: GRPO (arXiv 2402.03300); Flow-GRPO (arXiv 2505.05470, eq. 4). std is the population standard deviation of all
rewards ("global") or of the group's rewards ("group"); with "none" nothing is divided. A NaN is a missing reward: it
counts in no statistic and its advantage is NaN. Each column is normalised separately.

Everything is computed in float64. Rewards are first measured from one reward of their group, so that a group of equal
rewards gives exactly 0.

The public function is `fastflowgrpo.group_advantages`. The Triton kernel here serves callers whose scores are on a GPU:
it needs no copy to the CPU and no synchronisation. The trainer never runs it, because the scores of an epoch are
gathered on the CPU, where the C++ extension computes the advantages.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

EPSILON = 1e-4


def group_advantage_reference(rewards: Tensor, group_ids: Tensor, std: str) -> Tensor:
    """Advantages of each column in plain torch.

    Args:
        rewards: (N, K) float64; a row with NaN in one column must have NaN in all.
        group_ids: (N,) int64, any values.
        std: "global", "group" or "none".

    Returns:
        (N, K) float64.
    """
    present = ~rewards.isnan().any(1)
    groups = group_ids.unique(return_inverse=True)[1]
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    zeros = rewards.new_zeros(num_groups, rewards.shape[1])
    members = groups[present]
    count = zeros[:, 0].index_add(0, members, torch.ones_like(members, dtype=torch.float64))[:, None]

    def group_mean(values: Tensor) -> Tensor:
        return (zeros.index_add(0, members, values[present]) / count)[groups]

    values = rewards[present]
    centre = zeros.scatter_reduce(0, members[:, None].expand_as(values), values, "amin", include_self=False)
    centred = rewards - centre[groups]
    advantage = centred - group_mean(centred)
    if std == "group":
        return advantage / (group_mean(advantage.square()).sqrt() + EPSILON)
    if std == "global":
        return advantage / (global_std(rewards) + EPSILON)
    return advantage


def global_std(rewards: Tensor) -> Tensor:
    """Population standard deviation (K,) of each column of rewards (N, K), missing ones left out. It does not sync."""
    present = ~rewards.isnan()
    count = present.sum(0)
    mean = rewards.where(present, 0).sum(0) / count
    return ((rewards - mean).where(present, 0).square().sum(0) / count).sqrt()


def group_advantage_triton(rewards: Tensor, group_ids: Tensor, std: str) -> Tensor:
    """`group_advantage_reference` in one kernel, over the rows sorted by their group id.

    It uses no atomics, so the same inputs give the same bits. The host never waits for the device.
    """
    rows, columns = rewards.shape
    out = torch.empty_like(rewards)
    if rows:
        ids, order = group_ids.sort(stable=True)
        ends = torch.searchsorted(ids, ids, right=True)
        scale = global_std(rewards) if std == "global" else rewards  # not read if std is not global
        _group_kernel[(rows, columns)](
            rewards, order, ends, scale, out, *rewards.stride(), *out.stride(), std, EPSILON, BLOCK=256, num_warps=1
        )
    return out


if triton is not None:

    @triton.jit
    def _load(rewards, order, start, end, stride_row, stride_column, column, BLOCK: tl.constexpr):
        """A block of a group: row numbers, a mask of the rows that belong to the group, rewards in one column."""
        positions = start + tl.arange(0, BLOCK)
        member = positions < end
        rows = tl.load(order + positions, mask=member, other=0)
        values = tl.load(rewards + rows * stride_row + column * stride_column, mask=member, other=float("nan"))
        return rows, member, values

    @triton.jit
    def _group_kernel(
        rewards,
        order,
        ends,
        scale,
        out,
        stride_row,
        stride_column,
        out_stride_row,
        out_stride_column,
        STD: tl.constexpr,
        EPSILON: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program (i, k) does column k of the group that starts at sorted row i, and nothing if no group starts there.

        It merges the moments of the group's blocks one after the other (Chan, Golub, LeVeque 1979).
        """
        first = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1).to(tl.int64)
        if tl.load(ends + first - 1, mask=first > 0, other=0) != first:
            return
        end = tl.load(ends + first)
        count = tl.zeros((), tl.float64)
        mean = tl.zeros((), tl.float64)
        deviations = tl.zeros((), tl.float64)
        for start in range(first, end, BLOCK):
            _, _, values = _load(rewards, order, start, end, stride_row, stride_column, column, BLOCK)
            present = values == values
            block_count = tl.sum(present.to(tl.float64))
            if block_count > 0:
                centre = tl.min(tl.where(present, values, float("inf")))
                block_mean = centre + tl.sum(tl.where(present, values - centre, 0)) / block_count
                distance = tl.where(present, values - block_mean, 0)
                share = block_count / (count + block_count)
                delta = block_mean - mean
                mean += delta * share
                deviations += tl.sum(distance * distance) + delta * (count * share) * delta
                count += block_count
        divisor = tl.full((), 1, tl.float64)
        if STD == "group":
            divisor = tl.sqrt(deviations / tl.maximum(count, 1)) + EPSILON  # count is 0 if all rewards are missing
        if STD == "global":
            divisor = tl.load(scale + column) + EPSILON
        for start in range(first, end, BLOCK):
            rows, member, values = _load(rewards, order, start, end, stride_row, stride_column, column, BLOCK)
            target = out + rows * out_stride_row + column * out_stride_column
            tl.store(target, (values - mean) / divisor, mask=member)
