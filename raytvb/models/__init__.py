"""open_clip models, their zero-shot heads, and accuracies of models with merged weights.

`open_clip_models` says in which order to read the room.
"""
