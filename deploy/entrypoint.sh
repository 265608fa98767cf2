#!/bin/sh
# In the images: `edge` with these arguments, after what a container may lack was looked for.
set -eu
if [ "${1:-}" = health ]; then
    # Whether something answers; a page that asks for its key does.
    exec python -c '
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=4)
except urllib.error.HTTPError as error:
    sys.exit(error.code >= 500)
except OSError as error:
    sys.exit(str(error))' "$2"
fi
if [ "$EDGE_LLAMA_CPU" = portable ] && [ "$(uname -m)" = x86_64 ] && ! grep -qw avx2 /proc/cpuinfo; then
    echo "error: this processor has no AVX2, for which the image was built" >&2
    echo "  build one on this machine: docker compose build --build-arg LLAMA_CPU=native" >&2
    exit 1
fi
folders=/cache
[ "${1:-}" = serve ] || folders="/cache /work/models /work/data /work/runs /work/jobs"
for folder in $folders; do
    if ! [ -w "$folder" ]; then
        echo "error: $folder cannot be written by the container's user $(id -u)" >&2
        echo "  what is mounted there must be its own: chown -R $(id -u) FOLDER on the host, or EDGE_UID in .env" \
            "as the number of the folder's owner" >&2
        exit 1
    fi
done
# The converter that exports run, where they look for it.
if [ -d /opt/edge/sdist ]; then
    mkdir -p /cache/edge/sdist
    for source in /opt/edge/sdist/*; do
        [ -e "/cache/edge/sdist/${source##*/}" ] || ln -sfn "$source" "/cache/edge/sdist/${source##*/}"
    done
fi
[ "${1:-}" = ui ] || exec edge "$@"
# With the container ends what the page has started: a training is told, and writes a checkpoint first.
edge "$@" &
page=$!
trap 'kill -TERM $page' TERM INT
code=0
wait $page || code=$?
# The signal itself ends the first wait.
[ $code -le 128 ] || { code=0; wait $page || code=$?; }
python -c '
import pathlib, time
from edge.jobs import job
jobs = [one for one in job.jobs(pathlib.Path("jobs")) if one.state in job.RUNNING]
for one in jobs:
    print(f"stopping job {one.name}:", *one.argv)
    one.stop()
while any(one.state in job.RUNNING for one in jobs):
    time.sleep(0.2)'
exit $code
