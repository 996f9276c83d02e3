#!/usr/bin/env bash
# From a text to a model that knows two domains: a tokenizer, training from scratch, a first look at what it writes, a
# domain added, and what that made it forget. With nothing set it needs no network: it learns English from the
# documentation inside your own Python, then adds the code of Python's standard library.
#
#   bash examples/continual_pipeline.sh
#   TRAIN=book.txt VALID=held_out.txt DOMAIN=medical DOMAIN_TEXT=medical.txt bash examples/continual_pipeline.sh
#
# Run it in the environment that seedbed is installed in. The same command again goes on where it was stopped.
set -euo pipefail

if [[ -n "${DOMAIN_TEXT:-}" ]]; then
  : "${DOMAIN:?name what DOMAIN_TEXT is about, as the history of the model will call it}"
fi
OUTPUT="${OUTPUT:-runs/continual}"      # everything goes below it
TRAIN="${TRAIN:-python-docs}"           # the first text: a file, a folder, or a name from `seedbed data list`
VALID="${VALID:-}"                      # text to validate on; without one, a tenth of the documents of TRAIN
DOMAIN="${DOMAIN:-python-source}"       # what is added later
DOMAIN_TEXT="${DOMAIN_TEXT:-}"          # its text; without one, the code of the standard library
DOMAIN_BYTES="${DOMAIN_BYTES:-500000}"  # of that code
VOCAB="${VOCAB:-2048}"                  # tokens of the tokenizer
MODEL="${MODEL:-}"                      # a preset, or a folder with a config.json; without one, a very small one
CONTEXT="${CONTEXT:-128}"               # tokens in a row
EPOCHS="${EPOCHS:-2}"                   # passes over TRAIN, at most; more for a model that is to be used
STEPS="${STEPS:-}"                      # steps instead
PATIENCE="${PATIENCE:-2}"               # epochs without a better validation loss, after which it stops
WARMUP="${WARMUP:-0.05}"                # share of the steps in which the learning rate rises
DOMAIN_EPOCHS="${DOMAIN_EPOCHS:-1}"     # passes over DOMAIN_TEXT
DOMAIN_STEPS="${DOMAIN_STEPS:-}"        # steps instead
MAX_FORGETTING="${MAX_FORGETTING:-0.1}" # share by which TRAIN may become worse before the run says so
PROMPT="${PROMPT:-The}"

general="$OUTPUT/general"
adapted="$OUTPUT/$DOMAIN"
mkdir -p "$OUTPUT"

# The tokenizer must not have seen what the model is validated on either, so both commands are told what is held out.
if [[ -n "$VALID" ]]; then
  held_out=(--val_data "$VALID")
else
  held_out=(--val_split 0.1)
fi

# A folder of its own, so that other models can share the tokenizer. It is never trained twice: a model's numbers mean
# nothing under another one.
if [[ ! -f "$OUTPUT/tokenizer/tokenizer.json" ]]; then
  seedbed tokenizer train --data "$TRAIN" "${held_out[@]}" --vocab_size "$VOCAB" --output "$OUTPUT/tokenizer"
fi

if [[ -n "$MODEL" ]]; then
  model=(--model "$MODEL")
else # a million parameters, which learn something in minutes
  model=(--model tiny --d_model 128 --num_layers 4 --num_heads 2 --batch_size 8 --learning_rate 0.004)
fi
length=(--epochs "$EPOCHS")
[[ -z "$STEPS" ]] || length=(--max_steps "$STEPS")

# The learning rate rises slowly, because AdamW does not yet know how large the gradients are. The run ends early, and
# with its best weights, once the validation loss no longer falls.
seedbed pretrain --data "$TRAIN" "${held_out[@]}" --tokenizer "$OUTPUT/tokenizer" "${model[@]}" \
  --max_seq_len "$CONTEXT" "${length[@]}" --warmup_ratio "$WARMUP" --early_stopping_patience "$PATIENCE" \
  --output "$general"

seedbed generate --model "$general" --prompt "$PROMPT" --max_new_tokens 60

# Docstrings and comments are left out of the code. The docstrings are what TRAIN holds by default: their held-out part
# would be learnt here, and `seedbed continue` refuses that.
if [[ -z "$DOMAIN_TEXT" ]]; then
  DOMAIN_TEXT="$OUTPUT/$DOMAIN.txt"
  [[ -f "$DOMAIN_TEXT" ]] || python3 - "$DOMAIN_TEXT" "$DOMAIN_BYTES" <<'PYTHON'
import ast
import sys
import sysconfig
from pathlib import Path

output, limit = Path(sys.argv[1]), int(sys.argv[2])
with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
modules = []
for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, with_docstring) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    modules.append(ast.unparse(tree))
    limit -= len(modules[-1].encode())
    if limit <= 0:
        break
output.write_text("\n<|endoftext|>\n".join(modules), encoding="utf-8")
PYTHON
fi

# Learns the domain and replays a little of TRAIN beside it; the learning rate rises once more, to half of its first
# height, and falls. What is forgotten is measured on the text that the first run held out. `--on_forgetting warn` only
# says when that is too much; the default would go back to the best weights within the limit.
length=(--epochs "$DOMAIN_EPOCHS")
[[ -z "$DOMAIN_STEPS" ]] || length=(--max_steps "$DOMAIN_STEPS")
seedbed continue --model "$general" --data "$DOMAIN_TEXT" --domain "$DOMAIN" --max_seq_len "$CONTEXT" \
  "${length[@]}" --max_forgetting "$MAX_FORGETTING" --on_forgetting warn --output "$adapted"

# On the domain's held-out text; then everything it knows, before and after.
seedbed evaluate --model "$adapted"
seedbed generate --model "$adapted" --prompt "$PROMPT" --max_new_tokens 60
seedbed runs show "$adapted" --lineage
