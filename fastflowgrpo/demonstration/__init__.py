"""The demo: images of one prompt by the base model and by trained weights, from the same noise, on a web page.

`generation` makes and scores the images, `examples` chooses the prompts that are offered, and `page`, the only file
that imports Gradio, shows them. Pages on what a run has recorded, which need no model, do not belong here.
"""
