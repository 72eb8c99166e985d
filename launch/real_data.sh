#!/usr/bin/env bash
# Every stage on real preference data with a small model from scratch: HH helpful-base and TL;DR comparisons.
# Usage: launch/real_data.sh FOLDER [OVERRIDE ...], FOLDER holding the two files named below.
set -euo pipefail
data=${1:?the folder that holds the data files}
shift
run() { # name file template
  python train.py dataset=file dataset.name="$1" dataset.path="$data/$2" dataset.template="$3" model=small "${@:4}"
}
run hh-helpful-base hh_helpful-base_test.jsonl.gz hh "$@"
run tldr tldr_openai_comparisons_b13_b18_edit.jsonl.gz tldr "$@"
