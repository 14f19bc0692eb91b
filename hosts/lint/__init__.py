"""`quantwire lint`: what is wrong with a workflow file, found without running it or loading a model.

A file in the editor's form or in API form becomes one kind of graph (`graph.py`); `flow.py` follows models through it
and asks the compatibility table; `check.py` looks for nodes, files and formats that are not there.
"""
