"""How rewards are called: the contract, threads behind the rollout, worker processes, the reward server and its client.

What the rewards measure is in `fastflowgrpo.rewards`; nothing here imports it.
"""
