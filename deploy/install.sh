# Of the Dockerfile: /opt/edge with the packages of the extras $1, and llama.cpp.
set -eu
requirements=$(mktemp)
python3 - "$1" >"$requirements" <<'PYTHON'
import pathlib, sys, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [name for extra in sys.argv[1].split(",") for name in project["optional-dependencies"][extra]]
print(*project["dependencies"], *extras, sep="\n")
PYTHON
python3 -m venv /opt/edge
/opt/edge/bin/pip install --quiet "pip==$(python3 -c 'from edge.setup import PIP; print(PIP)')"
# First and alone, for PyTorch's index is far from many people, and would be asked for every other package too.
case $1 in *train*)
    [ -n "$CUDA" ] ||
        /opt/edge/bin/pip install --quiet --extra-index-url "$TORCH_INDEX_URL" -c edge/constraints.txt torch
esac
/opt/edge/bin/pip install --quiet -c edge/constraints.txt -r "$requirements"
if [ -n "$CUDA" ]; then
    # The two packages are one folder, and another package may have asked for the CPU's. torch brings the libraries.
    libraries='[cuda,cudnn]'
    case $1 in *train*) libraries= ;; esac
    /opt/edge/bin/pip uninstall --quiet --yes onnxruntime
    /opt/edge/bin/pip install --quiet -c edge/constraints.txt "onnxruntime-gpu$libraries"
fi
# Of a build that was stopped: the number is another process's by now.
rm -f /root/.cache/edge/wheels/*.pid
portable=--portable
[ "$LLAMA_CPU" = portable ] || portable=
/opt/edge/bin/python -m edge.machine.build_llamacpp $portable ${CUDA:+--cuda} \
    ${CUDA_ARCHITECTURES:+"--cuda-architectures=$CUDA_ARCHITECTURES"}
# llama.cpp's converter, which exports run, comes along; the build's own tools stay behind.
case $1 in *train*)
    sdist=$(/opt/edge/bin/python -c 'from edge.machine.llamacpp_source import sdist; print(sdist())')
    target=/opt/edge/sdist/$(basename "$sdist")/vendor/llama.cpp
    mkdir -p "$target"
    cp -r "$sdist"/vendor/llama.cpp/convert*.py "$sdist"/vendor/llama.cpp/conversion \
        "$sdist"/vendor/llama.cpp/gguf-py "$target"
esac
/opt/edge/bin/pip uninstall --quiet --yes cmake ninja scikit-build-core
