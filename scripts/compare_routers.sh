#!/usr/bin/env bash
# The routers and the balancing methods side by side on text of your own, at equal seconds: one table.
#   bash scripts/compare_routers.sh 'data/prose/*.jsonl' [SECONDS] [SEEDS]
# 18 variants; each seed takes about 18 * (SECONDS + 30) seconds. Stopped, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_minimoe

text=${1:?give a text file, or a pattern in quotes}
seconds=${2:-60}
seeds=${3:-2}
out=runs/routers
[ -e $out/tokenizer/tokenizer.json ] || minimoe tokenizer configs/routers/tokenizer.yaml data.train="$text"

raw=model.norm_topk_prob=false
entropy=model.router_entropy_loss_coef=1e-4
off=model.router_aux_loss_coef=0
minimoe sweep configs/routers/pretrain.yaml data.train="$text" --seconds "$seconds" --seeds "$seeds" --out $out/sweep \
  --variant "$raw" \
  --variant "model.scoring_func=sigmoid" \
  --variant "model.router_type=noisy_top_k" \
  --variant "model.router_type=top_p model.num_experts_per_tok=4 model.router_top_p=0.4 $raw" \
  --variant "model.router_type=top_p model.num_experts_per_tok=4 model.router_top_p=0.4 $raw $entropy" \
  --variant "model.router_type=expert_choice" \
  --variant "model.router_type=expert_choice $raw" \
  --variant "model.router_type=hash $off" \
  --variant "model.num_zero_computation_experts=2" \
  --variant "model.num_zero_computation_experts=4 model.num_experts_per_tok=3" \
  --variant "model.n_shared_experts=1 model.num_experts_per_tok=1 $raw" \
  --variant "model.num_experts_per_tok=1 $raw" \
  --variant "$off" \
  --variant "model.router_aux_loss_type=batch" \
  --variant "model.router_aux_loss_type=sequence" \
  --variant "model.scoring_func=sigmoid $off model.router_bias_update_rate=0.001" \
  --variant "model.scoring_func=sigmoid $off model.router_bias_update_rate=0.01"
