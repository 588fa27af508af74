"""The performance model: what a (model, cluster, layout) costs in seconds, bytes and FLOPs, for many layouts at once.

Read `estimate.py` first; `kernels`, `compute`, `collectives`, `memory` and `pipeline` are its parts. Nothing here runs
a model, imports torch or reads a file.
"""
