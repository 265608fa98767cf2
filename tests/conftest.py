"""What every test runs under: no model hub, and threads that leave the machine to others."""

import os

# Before torch is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
