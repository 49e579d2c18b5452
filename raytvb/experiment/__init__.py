"""The experiment that a user describes, and the place of its results in a store.

Read `config` first. It defines the experiment file as frozen objects; each section of the file has
a module in `sections`, and `parsing` reads the file. `identities` says what each stored thing
depends on, `layout` has the key of each stored thing, and `freezing` records which experiment a
store was made for. To check a file imports neither torch nor any other package that loads slowly.
"""
