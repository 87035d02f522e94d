"""Evaluations: sampling and scoring the evaluation prompts, and the statistics, tables and pictures of the results.

The trainer evaluates with it during a run, and the command `evaluate` compares trained weights with their base model.
Reading and writing the directory of a run belongs into `runs`, which may import this room but not the other way round.
"""
