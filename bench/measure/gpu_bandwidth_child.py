"""Read bandwidth of the first GPU: `python -m bench.measure.gpu_bandwidth_child BYTES`.

The last line is JSON. The kernel is PyTorch's maximum over 64-bit integers, timed by CUDA events: it writes
nothing but one number. Exit code 1 where PyTorch sees no GPU.
"""

from __future__ import annotations

import json
import statistics
import sys

PASSES = 20


def main(argv: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        return 1
    size = min(int(argv[0]), torch.cuda.mem_get_info()[0] // 2) // 8 * 8
    data = torch.ones(size // 8, dtype=torch.int64, device="cuda")
    rates = []
    for number in range(PASSES + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.max()
        end.record()
        end.synchronize()
        # The first passes load the kernel and wake the clocks.
        rates += [size / (begin.elapsed_time(end) / 1000)] if number >= 3 else []
    result = {"best": max(rates), "median": statistics.median(rates), "size": size, "threads": 0}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
