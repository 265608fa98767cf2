"""GOP/s of quantised products, beside llama.cpp's own: `python -m tests.csrc.products [INSTRUCTIONS]`.

INSTRUCTIONS: avx2, avx-vnni or avx512-vnni; left out, all that this processor has. llama.cpp is built for
them in build/csrc, which takes a minute or two, once.
"""

import argparse
import subprocess

from tests.csrc import builds

BUILDS = {
    "native": {"GGML_NATIVE": "ON"},
    "avx2": builds.AVX2,
    "avx-vnni": builds.AVX_VNNI,
    "avx512-vnni": builds.AVX512,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.csrc.products")
    parser.add_argument("instructions", nargs="?", choices=BUILDS, default="native")
    name = parser.parse_args().instructions
    subprocess.run([builds.built(name, BUILDS[name], "products") / "products"], check=True)
