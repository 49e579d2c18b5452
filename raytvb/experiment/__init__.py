"""What a user asks for, and where what comes of it lies in a store.

Read `config` first: the experiment file as frozen objects, whose `sections` are
one module each; `parsing` makes them from YAML. `identities` says what each stored thing
depends on, `layout` under which key it lies, `freezing` which experiment a store was made for.
Checking a file imports neither torch nor anything else that takes long.
"""
