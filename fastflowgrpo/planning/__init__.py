"""What a run will do and cost, before it starts: the plan of its batches, and the estimate that ``--dry_run`` prints.

Nothing here loads weights or trains: the estimate runs a `policy` on PyTorch's meta device.
"""
