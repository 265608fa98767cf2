"""OpenVINO GenAI's continuous batching over a GGUF file. That package's environment runs it.

python bench/servers/openvino_child.py MODEL.gguf THREADS

A line of JSON on standard input asks, {"prompts": [[1, 2], ...], "tokens": [8, ...]}; a line answers,
{"seconds": 0.5, "made": [8, ...]}. The first line tells the version, when the model is loaded.
"""

import json
import sys
import time

import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

model, threads = sys.argv[1], int(sys.argv[2])
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = 2
scheduler.enable_prefix_caching = False
pipeline = openvino_genai.ContinuousBatchingPipeline(
    model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
)


def tell(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


tell({"version": openvino_genai.get_version()})
for line in sys.stdin:
    asked = json.loads(line)
    prompts, settings = [], []
    for ids, count in zip(asked["prompts"], asked["tokens"], strict=True):
        tensor = openvino.Tensor(openvino.Type.i64, openvino.Shape([1, len(ids)]))
        tensor.data[:] = ids
        prompts.append(tensor)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        settings.append(config)
    began = time.perf_counter()
    results = pipeline.generate(prompts, settings)
    seconds = time.perf_counter() - began
    tell({"seconds": seconds, "made": [len(result.m_generation_ids[0]) for result in results]})
