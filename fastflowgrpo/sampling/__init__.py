"""From noise to clean latents: the samplers as step coefficients, the rollout of a training epoch, the ODE sampler, and
a scheduler for diffusers pipelines. The arithmetic of one step is in `kernels`; decoding and scoring are in `scoring`.
"""
