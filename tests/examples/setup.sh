#!/usr/bin/env bash
# Install what the tests of the examples need beside Python packages: setup.sh [PYTHON], which makes the environments.
# npm packages, Chromium and the C header (Debian), and environments of their own: onnxruntime-genai and optimum; Triton.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}

for folder in examples/node examples/web tests/examples; do
  cmp -s "$folder/package-lock.json" "$folder/node_modules/.installed" && continue
  npm ci --prefix "$folder" --no-audit --no-fund
  cp "$folder/package-lock.json" "$folder/node_modules/.installed"
done

if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends chromium
fi

[ -e examples/c/build/headers ] || make -C examples/c headers

if ! cmp -s tests/examples/peers.txt build/peers-venv/.installed; then
  "$python" -m venv --clear build/peers-venv
  build/peers-venv/bin/python -m pip install -q --disable-pip-version-check --no-compile -r tests/examples/peers.txt
  cp tests/examples/peers.txt build/peers-venv/.installed
fi

if ! cmp -s tests/examples/triton.txt build/triton-venv/.installed; then
  "$python" -m venv --clear build/triton-venv
  build/triton-venv/bin/python -m pip install -q --disable-pip-version-check --no-compile -r tests/examples/triton.txt
  libraries=$(echo build/triton-venv/lib/python3.*)
  server=$libraries/site-packages/pytriton/tritonserver
  install -m 755 "$server/python_backend_stubs/${libraries##*python}/"* "$server/backends/python"
  cp tests/examples/triton.txt build/triton-venv/.installed
fi
