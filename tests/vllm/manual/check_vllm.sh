#!/bin/bash
# The library with a release of vLLM that no test runs, on a machine with a GPU and the internet.
# No test can: there is no build of vLLM 0.33.0 for CPUs on PyPI, and our tests have no GPU.
#
# NOT YET RUN, on no machine. docs/serving.md says what is known of 0.33.0 from reading it.
#
#   ./bazelw build //:wheel
#   bash tests/vllm/manual/check_vllm.sh bazel-bin/speculators-*.whl DRAFT PROMPTS.jsonl [VERSION]
#
# DRAFT is a draft's folder, such as outputs/hass, whose verifier is where its config.json says;
# PROMPTS a file as for training, such as examples/tiny_verifier/prompts_eval.jsonl. Give it one
# draft of each type: eagle and hass run on the plugin's model, eagle3 on vLLM's own.
#
# A check that fails does not keep the others from running; the last lines name those that did. They,
# the versions above them, and the reports in its folder are what docs/serving.md is to say then.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
wheel=$(realpath "$1") draft=$(realpath "$2") prompts=$(realpath "$3") version=${4:-0.33.0}
work=$(mktemp -d "${TMPDIR:-/tmp}/check-vllm-XXXXXX")
echo "everything is in $work"

# One pip command, so that one set of versions serves both.
python3 -m venv "$work/environment"
source "$work/environment/bin/activate"
python -m pip install --quiet --upgrade pip
python -m pip install "vllm==$version" "$wheel"
python -m pip check || echo "note: the lines above; vLLM itself may leave some"
cd "$work"
export VLLM_NO_USAGE_STATS=1
failed=()

check() { # a name, and a command
    echo "== $1"
    "${@:2}" || failed+=("$1")
}

# The plugin says in a warning what it does not find in vLLM; here that is an error.
check "the plugin finds all that it knows" python -W error:vLLM:RuntimeWarning - <<'PYTHON'
import vllm.plugins

vllm.plugins.load_general_plugins()
from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

assert {"eagle", "hass", "eagle3"} <= set(SUPPORTED_SPECULATORS_TYPES), SUPPORTED_SPECULATORS_TYPES
PYTHON

# vLLM has two model runners, and on a GPU takes the second by default. Our tests, on CPUs, have only
# ever run the first. In float32 all should be equal; a GPU rounds products to TF32 if it is let.
for runner in 0 1; do
    mkdir "contract-$runner"
    check "the same acceptance, model runner $((runner + 1))" \
        env NVIDIA_TF32_OVERRIDE=0 VLLM_USE_V2_MODEL_RUNNER=$runner \
        speculators evaluate "$draft" --prompts="$prompts" --dtype=float32 --against-vllm \
        --evaluate.limit=32 --output-dir="contract-$runner"
done

# Its first documents are compared with transformers.
verifier=$(python -c 'import json, sys
config = json.load(open(sys.argv[1]))
print(config["speculators_config"]["verifier"]["name_or_path"])' "$draft/config.json")
states=(--verifier="$verifier" --output-dir=states --generate.source=vllm
    --generate.regenerate=true --generate.max-new-tokens=64)
check "prepare" speculators prepare "${states[@]}" --data="$prompts" --prepare.num-samples=64
check "hidden states from vLLM" speculators generate --algo=eagle3 "${states[@]}"

check "bench" speculators bench "$draft" --prompts="$prompts" --output-dir=bench

check "the environment" speculators env
echo "== versions"
python -m pip list 2>/dev/null | grep -iE '^(vllm|torch|transformers|triton|flashinfer-python) '
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed: vLLM $version"
