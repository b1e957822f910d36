#!/usr/bin/env bash
# Set the project up and run it.
# Usage: bash setup.sh [install | scripts | quickstart [--translation | --pretraining] | test [--slow | --gpu]]
#   install     (default) a virtual environment in .venv with pinned packages, and the script of every table row
#   scripts     only write the scripts to generated-scripts/
#   quickstart  install, train ResNet20 on the embedded digits in six rows of three seeds, print the table;
#               with --translation, train a factorized Transformer on embedded number words and print its BLEU;
#               with --pretraining, train four encoders on embedded sentences about numbers and print the table
#   test        install, check style and types, run the tests; with --slow, also the slow tests (forty kills per program, a real Slurm);
#               with --gpu, only the tests that need a GPU
# Steps that are already done are skipped. PYTHON names the Python (3.11 or newer) that creates .venv; if .venv has another
# version, it is created again.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
python=.venv/bin/python

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'setup.sh: error: %s\n' "$*" >&2; exit 1; }

install() {
  local base=${PYTHON:-python3} stamp=.venv/installed wanted
  local clear=()
  wanted=$(cat pyproject.toml constraints.txt | cksum)
  if [[ -n ${PYTHON:-} && -x $python ]] && command -v "$base" >/dev/null && [[ $("$base" -V 2>&1) != $("$python" -V 2>&1) ]]; then
    clear=(--clear)  # .venv has another Python than the one that PYTHON names
  elif [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "packages are installed in .venv"
    return
  fi
  command -v "$base" >/dev/null || die "$base is not on PATH: install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 bash setup.sh"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$base is $("$base" -V 2>&1), but Python 3.11 or newer is needed: name one with PYTHON=/path/to/python3"
  say "creating .venv with $("$base" -V 2>&1)"
  "$base" -m venv ${clear[@]+"${clear[@]}"} .venv || die "could not create .venv (on Debian: apt install python3-venv)"
  say "installing packages; torch alone has several gigabytes, so the first time takes minutes"
  "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,translation,pretraining]' ||
    die "pip could not install the packages: the lines above say why; run setup.sh again to resume"
  "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("fairseq") is None)' ||
    say "translation cannot be trained here: fairseq's wheel is for Python 3.11 and 3.12 on Linux x86_64; everything else works"
  printf '%s\n' "$wanted" >"$stamp"
}

scripts() {
  [[ -x $python ]] || die "there is no .venv yet: run bash setup.sh first"
  "$python" -m common.tables emit
}

quickstart() {
  local started=$SECONDS
  say "training 6 rows of 3 seeds on the embedded digits, one run per core"
  # One thread per run: networks this small gain nothing from a second one.
  OMP_NUM_THREADS=1 "$python" -m common.tables run quickstart --jobs "$(getconf _NPROCESSORS_ONLN)" >/dev/null ||
    die "a run failed: the lines above say where its log is"
  say "trained in $((SECONDS - started)) seconds; logs are in results/logs/quickstart"
  say "figure: $("$python" -m common.tables plot --table quickstart)"
  "$python" -m common.tables collect --table quickstart
}

translation() {
  local run=results/quickstart-translation started=$SECONDS
  say "preparing number words, German to English"
  "$python" transformer_iwslt/prepare.py --corpus numbers >&2
  say "training a Transformer at half rank, with both schemes on all products; $run/metrics.jsonl has a line per epoch"
  "$python" transformer_iwslt/train.py data-bin/numbers --embed-dim 128 --ffn-dim 512 --rank-scale 0.5 \
    --spectral --spectral-quekey --spectral-outval --wd2fd --wd2fd-quekey --wd2fd-outval --frobenius-decay 1e-4 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3 --warmup-updates 100 --clip-norm 1 --dropout 0.1 \
    --max-update 900 --no-epoch-checkpoints --save-dir "$run"
  say "translating the test set"
  "$python" transformer_iwslt/generate.py data-bin/numbers --path "$run/checkpoint_best.pt" --batch-size 128 --beam 5 --quiet
  say "took $((SECONDS - started)) seconds; to translate your own words: echo einundvierzig |" \
    ".venv/bin/python transformer_iwslt/translate.py --checkpoint $run/checkpoint_best.pt"
}

pretraining() {
  local started=$SECONDS
  say "preparing sentences about numbers"
  "$python" bert_pretraining/prepare.py --corpus numbers >&2
  say "pre-training 4 encoders, one run per core"
  OMP_NUM_THREADS=1 "$python" -m common.tables run quickstart-pretraining --jobs "$(getconf _NPROCESSORS_ONLN)" >/dev/null ||
    die "a run failed: the lines above say where its log is"
  say "trained in $((SECONDS - started)) seconds; logs are in results/logs/quickstart-pretraining"
  say "figure: $("$python" -m common.tables plot --table quickstart-pretraining)"
  "$python" -m common.tables collect --table quickstart-pretraining
}

tests() {  # one process per core; the tests of a file share a process, and what is trained for them
  .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/ty check &&
    .venv/bin/pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile "$@"
}

known() { [[ $# -eq 0 ]] || die "unknown word '$1': the first lines of setup.sh show its usage"; }

case ${1:-install} in
  install) known "${@:2}" && install && scripts && say "next: bash setup.sh quickstart, or any script in generated-scripts/" ;;
  scripts) known "${@:2}" && scripts ;;
  quickstart)
    known "${@:3}"
    case ${2:-} in
      --translation) install && translation ;;
      --pretraining) install && pretraining ;;
      "") install && scripts && quickstart ;;
      *) known "$2" ;;
    esac
    ;;
  test)
    known "${@:3}"
    case ${2:-} in
      --slow) install && tests ;;
      --gpu) install && .venv/bin/pytest -m gpu ;;
      "") install && tests -m "not slow" ;;
      *) known "$2" ;;
    esac
    ;;
  *) die "unknown command '$1': use install, scripts, quickstart or test" ;;
esac
