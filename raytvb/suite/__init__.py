"""The task suite that comes with the package: images drawn on the spot, and a tiny CLIP trained on
them.

Read `task_names` first: which tasks there are, and their classes and prompts. `sources` says what
an image shows (drawn by `characters`, `shapes` and `textures` on the `canvas`), `domains` how it
looks, and `glyphs` puts the two together into the images of a task. `pretrain` made the weights of
the tiny CLIP.
"""
