"""edge: serve a small language model, artefact in, HTTP out. Nothing here imports torch."""

__version__ = "0.1.0"
