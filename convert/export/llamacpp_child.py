"""llama.cpp's quantiser as a process of its own: `python llamacpp_child.py < job.json`, log on stderr.

Native code may abort, so convert.export.llamacpp_tools never loads it. The job on standard input is an object
with `source` and `target`: paths; `ftype`: a llama_ftype; `threads`; `imatrix`: a safetensors file with an
importance matrix, or "". The exit code is what llama.cpp returns, 0 for success.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import llama_cpp.llama_cpp as lib
from safetensors.numpy import load_file


def main() -> int:
    job = json.loads(sys.stdin.buffer.read().decode("utf-8"))
    params = lib.llama_model_quantize_default_params()
    params.ftype = job["ftype"]
    params.nthread = job["threads"]
    # A 7B model's largest tensor in float32, in parts of this size.
    params.max_buf_size = 1 << 30
    if job["imatrix"]:
        matrix = load_file(job["imatrix"])
        # The list ends with an entry without a name.
        entries = (lib.llama_model_imatrix_data * (len(matrix) + 1))()
        for entry, (name, values) in zip(entries, matrix.items(), strict=False):
            entry.name = name.encode("utf-8")
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = entries
    source, target = os.fsencode(job["source"]), os.fsencode(job["target"])
    return int(lib.llama_model_quantize(source, target, params))


if __name__ == "__main__":
    sys.exit(main())
