#!/usr/bin/env bash
# Every stage on real preference data with a small model from scratch.
# Usage: launch/real_data.sh HH_FILE TLDR_FILE [OVERRIDE ...]
#   HH_FILE    Anthropic's HH, JSON lines of chosen and rejected dialogues (for example helpful-base/test.jsonl.gz)
#   TLDR_FILE  OpenAI's TL;DR comparisons, JSON lines of info, summaries and choice (any of its batches)
set -euo pipefail
hh=$(realpath "${1:?the file of HH dialogues}")
tldr=$(realpath "${2:?the file of TL;DR comparisons}")
shift 2
cd "$(dirname "$0")/.."
run() { # name file template
  "${PYTHON:-.venv/bin/python}" train.py dataset=file dataset.on_invalid=skip dataset.name="$1" dataset.path="$2" dataset.template="$3" model=small "${@:4}"
}
status=0
run hh-helpful-base "$hh" hh "$@" || status=$?
run tldr "$tldr" tldr "$@" || status=$?
exit "$status"
