"""The HTTP process: FastAPI over a supervised engine. Artefact in, HTTP out; no torch."""
