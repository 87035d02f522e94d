"""How rewards are called: the contract, threads behind the rollout, worker processes, the reward server and its client.
Also the sampling of an epoch beside its scoring, and the choice of seeds by the scores of cheap samples.

What the rewards measure is in `fastflowgrpo.rewards`; nothing here imports it.
"""
