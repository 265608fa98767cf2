"""The HTTP process: FastAPI over an engine in a process of its own. An artefact in, HTTP out; no torch."""
