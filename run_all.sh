#!/usr/bin/env bash
# The whole pipeline: SFT, reward model, DPO and RLOO from the SFT model, evaluation of all three, comparison.
#
#   ./run_all.sh          Qwen/Qwen2.5-0.5B on SmolTalk and UltraFeedback, judged by NVIDIA's Nemotron (NVIDIA_API_KEY)
#   ./run_all.sh demo     the same stages with a small model on the CPU, offline, in minutes
#
# A finished stage is skipped and a stopped one resumed; remove its folder to run it again. More arguments go to every
# training stage, such as --config configs/trainer/ddp.yaml or --data.max_samples 1000. It runs with PYTHON, the active
# environment's python, or .venv's.
set -euo pipefail
cd "$(dirname "$0")"

configs=configs
out=outputs
case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' run_all.sh
    exit
    ;;
  demo | "" | -*) ;;
  *)
    printf 'error: no command %s; there are ./run_all.sh, which takes hours, and ./run_all.sh demo\n' "'$1'" >&2
    exit 2
    ;;
esac
if [ "${1:-}" = demo ]; then
  shift
  configs=configs/demo
  out=outputs/demo
  export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
fi
extra=("$@")
python=${PYTHON:-python}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  python=.venv/bin/python
fi
export WANDB_RUN_GROUP="${WANDB_RUN_GROUP:-$(basename "$out")-$(date +%Y%m%d-%H%M%S)}"
started=$SECONDS

headline() { printf '\n=== %s  [%d s]\n' "$1" "$((SECONDS - started))"; }

# stage NAME FOLDER MARKER COMMAND...: run and log a stage unless its marker exists; name it where it fails
stage() {
  local name=$1 folder=$2 marker=$3
  shift 3
  if [ -e "$marker" ]; then
    headline "$name: finished before, skipped"
    return
  fi
  headline "$name"
  mkdir -p "$folder"
  local code=0
  "$@" 2>&1 | tee -ia "$folder/log.txt" || code=${PIPESTATUS[0]} # -i: a Ctrl-C is the stage's, whose last words count
  if [ "$code" = 143 ] || [ "$code" = 130 ]; then
    printf '\nstage %s was asked to end; run this again to go on from what it saved\n' "$name" >&2
    exit "$code"
  fi
  if [ "$code" != 0 ] || [ ! -e "$marker" ]; then
    printf '\nstage %s failed; its log is %s\n' "$name" "$folder/log.txt" >&2
    exit 1
  fi
}

# train NAME CONFIG OPTIONS...: fit from the newest whole checkpoint where there is one
train() {
  local name=$1 config=$2 resume=()
  shift 2
  compgen -G "$out/$name/checkpoints/*.ckpt" >/dev/null && resume=(--ckpt_path last)
  stage "$name" "$out/$name" "$out/$name/final/config.json" \
    "$python" cli.py fit --config "$configs/$config.yaml" "$@" ${resume[@]+"${resume[@]}"} ${extra[@]+"${extra[@]}"}
}

# judged NAME: whether a stage's final model has a valid evaluation
judged() { grep --quiet '"valid": true' "$out/$1/eval/final/metrics.json" 2>/dev/null; }

# evaluate NAME OPTIONS...: judge a stage's final model; one with too few scores is gone on with at the next start
evaluate() {
  local name=$1 metrics=$out/$1/eval/final/metrics.json
  shift
  judged "$name" || rm -f "$metrics"
  stage "evaluate $name" "$out/$name" "$metrics" \
    "$python" cli.py validate --config "$configs/$name.yaml" --model.model_name "$out/$name/final" "$@"
  if ! judged "$name"; then
    printf '\ntoo many answers of %s have no score; start again to go on from those that have one\n' "$name" >&2
    exit 1
  fi
}

# unfinished: whether any of the three still has to be trained or judged
unfinished() {
  local name
  for name in sft dpo rloo; do
    [ -e "$out/$name/final/config.json" ] && judged "$name" || return 0
  done
  return 1
}

main() {
  if [ "$out" = outputs/demo ]; then
    mkdir -p "$out"
    if unfinished; then # it starts while the material is made
      "$python" cli.py serve-reward --reward demo.judge.judge --port 8399 >"$out/judge.log" 2>&1 &
      judge=$!
      trap 'kill "$judge" 2>/dev/null || true' EXIT
    fi
    stage material "$out/material" "$out/material/ultrafeedback/data/test_prefs-00000-of-00001.parquet" \
      "$python" -m demo.material "$out/material"
    if [ -n "${judge:-}" ]; then
      headline "judge: a reward server on loopback that speaks Nemotron's protocol"
      for _ in $(seq 240); do
        curl --silent --fail http://127.0.0.1:8399/health >/dev/null && break
        kill -0 "$judge" 2>/dev/null || break
        sleep 0.5
      done
      cat "$out/judge.log"
      curl --silent --fail http://127.0.0.1:8399/health >/dev/null || { echo "the judge does not answer" >&2; exit 1; }
    fi
    # What the three are compared with: a model that has seen a part of what SFT sees, as an untuned peer.
    train reference sft --trainer.default_root_dir "$out/reference" --trainer.max_steps 250 \
      --evaluation.num_prompts 0 --checkpoint.monitor null
  fi

  train sft sft
  train reward reward
  train dpo dpo
  train rloo rloo
  evaluate sft
  evaluate dpo --model.reference_model "$out/sft/final"
  evaluate rloo --model.reference_model "$out/sft/final"

  headline comparison
  "$python" cli.py compare "$out/sft" "$out/dpo" "$out/rloo" --output "$out/report"
  printf '\nall done in %d s: open %s\n' "$((SECONDS - started))" "$out/report/report.html"
}

main # a function is read whole before it runs, so an edit of this file cannot reach a run under way
