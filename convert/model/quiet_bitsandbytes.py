"""bitsandbytes by itself: it fetches no kernels from a hub, and gives no advice to install them.

With the package `kernels` beside it, its backends for the CPU and for MPS fetch code from a hub and run it.
"""

from __future__ import annotations

import logging
import sys


def alone() -> None:
    """To be called before bitsandbytes is imported or used: `import kernels` fails from then on."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
