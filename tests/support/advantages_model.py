"""The group advantages written out in numpy, group by group."""

import numpy as np


def model(rewards, ids, weights=(1.0,), std="global", gdpo=False):
    """Advantages (N,) float64 of rewards (N,) or (N, K); a sample without one of its rewards is missing."""
    rewards = np.asarray(rewards, dtype=np.float64).reshape(len(ids), len(weights))
    ids = np.asarray(ids)
    present = ~np.isnan(rewards).any(1)
    out = np.where(present, 0.0, np.nan)
    terms = list(zip(weights, rewards.T, strict=True)) if gdpo else [(1.0, (rewards * weights).sum(1))]
    for weight, values in terms:
        for group in np.unique(ids[present]):
            rows = present & (ids == group)
            advantage = values[rows] - values[rows].mean()
            if std != "none":
                advantage /= np.std(values[present if std == "global" else rows]) + 1e-4
            out[rows] += weight * advantage
    return out
