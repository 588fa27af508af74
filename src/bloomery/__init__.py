"""Bloomery: describe, plan, run and reconcile the training of language models.

Importing the package costs nothing: each room is imported where it is used (DESIGN: cli imports inside commands).
"""

__version__ = "0.1.0"
