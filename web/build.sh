#!/usr/bin/env bash
# Puts the page together in web/dist: its own files, onnxruntime-web from npm, the networks as ONNX.
#   bash web/build.sh
#   python -m http.server --directory web/dist
# It needs npm, and the extra `export` for tools/export.py: pip install '.[export]'
#   PYTHON=/path/to/python   the Python that has it; .venv's if there is one
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

fail() { # LINE
    echo "error: $1" >&2
    exit 2
}

command -v npm >/dev/null || fail "npm is missing; it comes with Node.js (https://nodejs.org)"
npm ci --prefix web --omit=dev --ignore-scripts --no-audit --no-fund --silent ||
    fail "npm could not install the packages of web/package-lock.json"

dist=web/dist
new=web/.dist-new
rm -rf "$new"
mkdir -p "$new/ort" "$new/nets"
cp -r web/index.html web/style.css web/js "$new"
for file in ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm; do
    cp "web/node_modules/onnxruntime-web/dist/$file" "$new/ort"
done

export_net() { # NAME OPTION...
    local name=$1
    shift
    "$PYTHON" tools/export.py "checkpoints/$name.safetensors" --output-dir "$new/nets" "$@"
}
export_net wgangp_faces --noises 32
export_net dcgan_faces --noises 32
export_net ddpm_digits --noises 11 --steps 12 --spacing beta
export_net digit_classifier_mnistm
export_net dann_svhn
export_net dann_usps
export_net guided_faces --noises 8 --steps 25

rm -rf "$dist"
mv "$new" "$dist"
echo "$dist: python -m http.server --directory $dist"
