"""The pages of `python -m fastflowgrpo.view`: reading runs for them (`contents`), the server on this machine
(`server`), and the export as files (`export`). `pages/` has the page itself, plain HTML, CSS and JavaScript, the same
for both.

Writing what the pages show belongs to `runs`. Nothing here imports torch.
"""
