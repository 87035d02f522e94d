"""Faults that are put into real training runs, and what became of each: ``python -m benchmarks.faults``.

`cases` lists them, `injection` puts one into a process, `runs` starts and compares runs, `rewards` has the rewards and
the server that misbehave.
"""
