"""The task suite that comes with the package: images drawn on demand, and a tiny CLIP trained on
them.

Read `task_names` first: it has the tasks, their classes and their prompts. `sources` says what an
image shows (drawn by `characters`, `shapes` and `textures` on the `canvas`). `domains` says how an
image looks. `glyphs` combines a source and a domain into the images of a task. `pretrain` made the
weights of the tiny CLIP.
"""
