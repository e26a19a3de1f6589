#!/usr/bin/env bash
# From nothing to a model that follows instructions: 8 to 12 minutes on 2 CPU cores after installation.
# Run it again and it picks up where it left off: finished stages are skipped, an interrupted one is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=runs/quickstart
DATA=data/quickstart
mkdir -p "$RUN"

timed() { # timed NAME COMMAND...: run the command and say how long it took
  local name=$1 started=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@"
  printf '== %s took %d s\n' "$name" $((SECONDS - started))
}

stage() { # stage NAME DONE_FILE COMMAND...: the same, unless DONE_FILE is there already
  local name=$1 done_file=$2
  shift 2
  if [ -e "$done_file" ]; then
    printf '\n== %s: already done (%s)\n' "$name" "$done_file"
  else
    timed "$name" "$@"
  fi
}

resume() { # --resume when the run has begun, nothing on the first start
  [ ! -e "$RUN/$1/config.yaml" ] || echo --resume
}

. scripts/environment.sh
install_minimoe

stage data "$DATA/test.jsonl" python -m scripts.quickstart.make_data --out "$DATA"
stage tokenizer "$RUN/tokenizer/tokenizer.json" minimoe tokenizer configs/quickstart/tokenizer.yaml
stage pretrain "$RUN/pretrain/final/config.json" minimoe pretrain configs/quickstart/pretrain.yaml $(resume pretrain)
stage sft "$RUN/sft/final/config.json" minimoe sft configs/quickstart/sft.yaml $(resume sft)
timed evaluate minimoe evaluate "$RUN/pretrain/final" --data "$DATA/valid_stories.jsonl"
timed generate minimoe generate "$RUN/pretrain/final" --config configs/quickstart/generate.yaml --prompt "Once upon a time"
timed score python -m scripts.quickstart.score --model "$RUN/sft/final" --pretrained "$RUN/pretrain/final" \
  --data "$DATA" --out "$RUN/score.json"

cat <<END

The whole took $SECONDS s. What there is now:
  $RUN/pretrain/final   the pretrained model       $RUN/pretrain/metrics.jsonl  its curve
  $RUN/sft/final        the model that follows     $RUN/score.json              every answer, with its mark
  $RUN/{pretrain,sft}/report.html   open it in a browser: curves, what each expert did, samples
What to try next:
  . .venv/bin/activate
  minimoe chat $RUN/sft/final
  minimoe generate $RUN/sft/final --chat --prompt "Write a story about Pip the mouse, a kite and the mill."
  minimoe preview configs/quickstart/sft.yaml
  minimoe pretrain configs/quickstart/pretrain.yaml data.train=YOUR_TEXTS.txt output_dir=runs/mine
END
