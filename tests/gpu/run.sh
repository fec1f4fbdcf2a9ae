#!/bin/sh
# Everything that has to be seen on a GPU: tests, then figures, with their log into the folder OUT. The Python at hand
# (PYTHON, else python3) has onnxruntime-gpu, PyTorch with CUDA, transformers and gptedge. More arguments: gpu.py's.
#   tests/gpu/run.sh OUT [--precisions fp16 ...]
set -u
out=$1 python=${PYTHON:-python3}
shift
# An export reads the version of the installed package, so PYTHONPATH alone is not enough.
"$python" -c 'import importlib.metadata as m, torch; m.version("gptedge"); assert torch.cuda.is_available(), "no GPU"' || exit 2
mkdir -p "$out" build/gpu-bundles
{
    [ -d build/gpu-bundles/tiny ] || "$python" tests/make_bundles.py build/gpu-bundles
    [ -d build/gpu-bundles/cuda/bf16 ] || "$python" tests/make_bundles.py build/gpu-bundles/cuda --cuda
    GPTEDGE_TEST_BUNDLES=$PWD/build/gpu-bundles "$python" -m pytest -q tests/gpu tests/runtime/test_provider.py
    echo "tests ended with $?"
    "$python" benchmarks/gpu.py build/gpu --output "$out" "$@"
    echo "figures ended with $?"
} 2>&1 | tee "$out/log.txt"
! grep -q "ended with [^0]" "$out/log.txt"
