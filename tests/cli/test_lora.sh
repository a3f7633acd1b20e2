#!/bin/sh
# Low-rank adapters by the command: training them, their files, running with them.
. "$(dirname "$0")/support.sh"

awk 'BEGIN { for (i = 0; i < 400; i++) print "In the beginning was line", i }' >text
awk 'BEGIN { for (i = 0; i < 400; i++) print "And the end is verse", i * 7 }' >other
"$make_model" base '{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 2, "mixer": "softmax"}' || fail "the model could not be made"
cp base/model.safetensors before
small="--data other --model base --batch 2 --length 64 --validation-windows 4 --dtype float32 --save-dtype float32"

for kind in lora rslora dora; do
  run 0 "$attn" train $small --out $kind --lora $kind --lora-rank 4 --lora-targets all --steps 20 -r 1e-2
  says err "trained "
  says err "attn run $kind"
  for file in adapter_config.json adapter_model.safetensors config.json model.safetensors; do
    [ -s "$kind/$file" ] || fail "$kind/$file is missing"
  done
  cp "$kind/adapter_config.json" out
  key LORA peft_type
  key 4 r
  key 16 lora_alpha
  key base base_model_name_or_path
  case $kind in rslora) key true use_rslora ;; *) key false use_rslora ;; esac
  case $kind in dora) key true use_dora ;; *) key false use_dora ;; esac

  # The base with the adapters is the merged model: the same text, the same loss.
  run 0 "$attn" run $kind --dtype float32 --prompt "And" -n 20 --seed 1 --json
  "$json" text <out >merged
  run 0 "$attn" run base --lora $kind --dtype float32 --prompt "And" -n 20 --seed 1 --json
  "$json" text <out >added
  cmp -s merged added || fail "$kind: run gives another text with --lora than with the merged model"
  run 0 "$attn" eval $kind --dtype float32 --data other --limit 500 --json
  "$json" loss <out >merged
  run 0 "$attn" eval base --lora $kind --dtype float32 --data other --limit 500 --json
  "$json" loss <out >added
  cmp -s merged added || fail "$kind: eval gives another loss with --lora than with the merged model"
  run 0 "$attn" eval base --dtype float32 --data other --limit 500 --json
  "$json" loss <out >plain
  awk -v a="$(cat added)" -v b="$(cat plain)" 'BEGIN { exit !(a < b - 0.05) }' ||
    fail "$kind: the loss is $(cat added), without adapters $(cat plain)"
done
cmp -s base/model.safetensors before || fail "training changed the base model"

# Without the merged model: the adapters alone, and what else was named.
run 0 "$attn" train $small --out alone --lora lora --lora-merge no --lora-trained norm --steps 3 --json
key 3 --lines steps
says err "attn run base --lora alone"
[ -e alone/model.safetensors ] && fail "--lora-merge no writes the merged model"
[ -s alone/adapter_model.safetensors ] || fail "alone/adapter_model.safetensors is missing"
cp alone/adapter_config.json out
key q_proj target_modules 0
key model.norm modules_to_save 0
run 0 "$attn" run base --lora alone --prompt "And" -n 5 --seed 1
[ "$(wc -c <alone/training.safetensors)" -lt "$(wc -c <base/model.safetensors)" ] ||
  fail "the checkpoint holds more than the adapters"

# Interrupted and continued by hand: the same command goes on.
run 0 "$attn" train $small --out alone --lora lora --lora-merge no --lora-trained norm --steps 3 --json
key 3 --lines first_step
run 1 "$attn" train $small --out alone --lora dora --lora-merge no --steps 3
says err "lora was lora, now dora"
run 1 "$attn" train $small --out alone --lora lora --lora-rank 2 --lora-trained norm --steps 3
says err "lora_rank was 8, now 2"

# A model with a tokenizer learns its tokens, not bytes.
"$make_model" words '{"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 2, "mixer": "softmax"}' || fail "the model could not be made"
cp "$source_directory/tests/unit/fixtures/tokenizer/smollm.json" words/tokenizer.json
run 0 "$attn" train --data other --model words --batch 2 --length 32 --validation-windows 4 \
  --dtype float32 --out spoken --lora lora --lora-targets all --steps 20 -r 1e-2
says err "bits per byte"
[ -s spoken/tokenizer.json ] || fail "the merged model has no tokenizer"
run 0 "$attn" eval words --dtype float32 --data other --limit 500 --json
"$json" loss <out >plain
run 0 "$attn" eval words --lora spoken --dtype float32 --data other --limit 500 --json
"$json" loss <out >added
awk -v a="$(cat added)" -v b="$(cat plain)" 'BEGIN { exit !(a < b - 0.05) }' ||
  fail "tokens: the loss is $(cat added), without adapters $(cat plain)"
run 1 "$attn" train --data other --model words --length 1M --out bad --lora lora
says err "tokens to train on"

# Refusals.
run 2 "$attn" train --data text --out bad --lora lora
says err "--model"
run 2 "$attn" train $small --out bad --lora-rank 4
says err "need --lora"
run 2 "$attn" train $small --out bad --lora full
says err "rslora"
run 1 "$attn" train $small --out bad --lora lora --lora-targets q_proj,query --steps 1
says err "no layer has a matrix named query; there are q_proj, k_proj, v_proj, o_proj"
run 1 "$attn" train $small --out bad --lora lora --lora-trained nothing --steps 1
says err "nothing"
run 1 "$attn" run base --lora no-such-directory --prompt x
says err "no-such-directory"
run 1 "$attn" run lora --lora lora --prompt x
says err "has these adapters in its weights"
"$make_model" wide '{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 2, "mixer": "softmax"}' || fail "the model could not be made"
for command in "run wide --prompt x" "eval wide --data text" "serve wide --port 0"; do
  run 1 "$attn" $command --lora lora
  says err "lora/adapter_model.safetensors: base_model.model.model.layers.0."
  says err "lora_A.weight is [4, 32], expected [4, 64]"
done
"$make_model" other-mixer '{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 2, "mixer": "lightning"}' || fail "the model could not be made"
run 1 "$attn" run other-mixer --lora alone --prompt x
says err "token_mixer.k_proj.lora_A.weight: the model, of type attn_decoder, has no matrix"

finish
