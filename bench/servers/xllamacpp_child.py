"""llama.cpp's server inside Python by xllamacpp, until it is terminated. That package's environment runs it.

python bench/servers/xllamacpp_child.py MODEL PORT SLOTS CONTEXT THREADS
"""

import signal
import sys
import threading

import xllamacpp  # type: ignore[import-not-found]

model, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:6])
params = xllamacpp.CommonParams()
params.model.path = model
params.hostnames = ["127.0.0.1"]
params.port = port
params.n_parallel = slots
params.n_ctx = slots * context
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
params.cache_ram_mib = 0
params.ui = False
server = xllamacpp.Server(params)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
ended.wait()
