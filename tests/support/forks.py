"""Processes forked from one that has imported everything and computed nothing: a run takes a second, not ten."""

import multiprocessing

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["fastflowgrpo.train", "fastflowgrpo.trainer", "matplotlib.figure", "support.killed_run"])
