#!/usr/bin/env bash
# The paper's evaluation on the local models, with what others use and with ablations; then the report.
# It may be interrupted: the same command goes on where it was, with what was measured kept. FRESH=1 begins anew
# (once: after an interruption, go on without it). AGAIN=1 adds a pass with other seeds, which begins elsewhere
# among the prompts: the report is of all passes, with narrower intervals.
#
#   make bench            results/bench/report.html, within 90 minutes on two cores
#   make bench AGAIN=1    the same of one pass more, within another 90
#   make bench QUICK=1    results/quick/report.html, within 10
set -euo pipefail
cd "$(dirname "$0")/.."

PEERS='sglang-adaptive,dynamic-table,hf-heuristic,goodput,bandit,survival-budget'
STATIC='static:1,static:2,static:3,static:5,static:8'
ABLATIONS='cascade[backoff=1],cascade[max_trials=1],cascade[trial_steps=8],cascade[set_steps=32]'
# Drafts after a match of one token: many, and seldom right. Here a static K loses.
SELDOM='{"method":"ngram","num_speculative_tokens":8,"prompt_lookup_min":1,"prompt_lookup_max":4}'

part() {  # NAME, then options of `moecascade bench`
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  if [[ -e $pass/$name.txt ]]; then
    echo "measured on $(date -r "$pass/$name.txt" '+%Y-%m-%d %H:%M'), kept: $pass/$name (FRESH=1 begins anew)"
    return
  fi
  moecascade bench --out "$pass/$name" "$@" >"$pass/$name.part"
  mv "$pass/$name.part" "$pass/$name.txt"
}

begin() {  # FOLDER; sets out, the pass that is to be made or gone on with, and its seeds
  out=$1
  mkdir -p "$out"
  exec 9>"$out/.evaluation"
  if ! flock -n 9; then
    echo "$0: another evaluation is running in $out" >&2
    exit 2
  fi
  if [[ ${FRESH:-} == 1 ]]; then
    rm -rf "${out:?}"/*
  fi
  local number=1
  while [[ -e $out/pass-$((number + 1)) ]]; do
    number=$((number + 1))
  done
  if [[ ${AGAIN:-} == 1 && -e $out/pass-$number/$last.txt ]]; then
    number=$((number + 1))
  fi
  pass=$out/pass-$number
  mkdir -p "$pass"
  seed=$((2 * number - 2))
  other_seed=$((seed + 1))
}

case ${1:-} in
  quick)
    last=core
    begin results/quick
    part core --models local --policies off,static:3,cascade,marginal --max-tokens 96 --minutes 7 --seed $seed
    ;;
  full)
    last=crowd
    begin results/bench
    part core --models local,mixtral-16,qwen-moe --policies "vllm,off,$STATIC,cascade,marginal,$PEERS" \
      --temperatures 0,0.8 --max-tokens 96 --warm-up 1 --minutes 40 --seed $seed
    # The same of a few policies on other prompts: three times as many pairs as all could have in that time.
    part further --models local,mixtral-16,qwen-moe --policies off,static:3,cascade,marginal \
      --temperatures 0,0.8 --max-tokens 96 --warm-up 2 --minutes 24 --seed $other_seed
    part dense --models dense --policies "off,$STATIC,cascade,marginal" --max-tokens 96 --minutes 5 --seed $seed
    part ablations --models mixtral-16 --policies "off,static:3,cascade,marginal,$ABLATIONS" \
      --temperatures 0.8 --max-tokens 192 --minutes 11 --seed $seed --speculative-config "$SELDOM"
    part crowd --models local --policies off,static:1,static:3,cascade,marginal,dynamic-table \
      --concurrency 4,8 --max-tokens 96 --warm-up 4 --minutes 12 --seed $seed
    ;;
  *)
    echo "usage: $0 quick|full" >&2
    exit 2
    ;;
esac
moecascade report "$out"
