"""bitsandbytes by itself: no kernels from a hub, no advice to install them, no line for each 8-bit product.

With the package `kernels` beside it, its backends for the CPU and for MPS fetch code from a hub and run it.
"""

from __future__ import annotations

import logging
import sys


def alone() -> None:
    """To be called before bitsandbytes is imported or used: `import kernels` fails from then on."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    for name in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
