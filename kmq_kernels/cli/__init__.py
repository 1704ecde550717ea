"""`kmq`: the three stages and their parts from the command line."""

from .app import app, main

__all__ = ["app", "main"]
