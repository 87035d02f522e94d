"""What a run keeps and shows: its directory, checkpoints, state, log, signals, model card and upload.

What is trained and how it is evaluated is elsewhere; here it is only written, read back and printed.
"""
