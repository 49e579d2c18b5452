"""The fine-tune of one task: its mask, its training, and the files that it stores.

`finetune_task` says in which order to read the room.
"""
