# attn train: a few steps, JSON lines, resuming after Ctrl-C to the same bits, bad input.
. "$(dirname "$0")/support.sh"

awk 'BEGIN { for (i = 0; i < 400; i++) print "In the beginning was line", i }' >text
echo '{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}' \
  >config.json
small="--config config.json --batch 2 --length 64 --validation-windows 4"

run 0 "$attn" train --data text --out made $small --steps 3
says err "3 steps"
says err "attn run made"
for file in config.json model.safetensors loss.svg loss.csv; do
  [ -s "made/$file" ] || fail "made/$file is missing"
done
run 0 "$attn" run made --prompt "In the" -n 10 --seed 1
run 0 "$attn" info made --json
key attn_decoder type

run 0 "$attn" train --data text --out lines $small --steps 3 --json --quiet
[ -s err ] && fail "--quiet prints on standard error"
[ "$(wc -l <out)" = 4 ] || fail "expected three lines of progress and one at the end"
key done --lines event
key 3 --lines steps
has --lines validation_loss
cmp -s made/model.safetensors lines/model.safetensors || fail "the same run gives other weights"

# Ctrl-C writes a checkpoint; the same command goes on, to the same bits.
steps="--steps 200 --checkpoint-every 0 --validate-every 0 --json --quiet"
run 0 "$attn" train --data text --out whole $small $steps
: >out # what the last run left would be taken for this one's
"$attn" train --data text --out stopped $small $steps >out 2>err </dev/null &
pid=$!
tries=0
until grep -q '"step":2,' out || [ $tries = 500 ]; do
  sleep 0.02
  tries=$((tries + 1))
done
kill -INT "$pid"
wait "$pid"
code=$?
if [ "$code" = 130 ]; then
  says err "the checkpoint is in stopped"
  key interrupted --lines event
elif [ "$code" != 0 ]; then # on a fast machine it may have been done before
  fail "exit code $code after Ctrl-C, expected 130"
fi
run 0 "$attn" train --data text --out stopped $small $steps
cmp -s whole/model.safetensors stopped/model.safetensors ||
  fail "interrupted and resumed gives other weights"

# Further training of a model.
run 0 "$attn" train --data text --out tuned --model made --batch 2 --length 64 --steps 2 \
  --validation-windows 4 --quiet

# A task instead of a text.
run 0 "$attn" train --task mqar --pairs 2 --length 16 --vocabulary 16 --out recall --config config.json \
  --batch 4 --steps 3 --validation-windows 4
says err "attn eval recall --task mqar"
run 0 "$attn" eval recall --task mqar --pairs 2 --length 16 --vocabulary 16 --examples 20
run 1 "$attn" train --task mqar --pairs 9 --length 16 --out bad --config config.json --steps 3
says err "9 pairs"
run 1 "$attn" train --task mqar --vocabulary 300 --out bad --config config.json --steps 3
says err "300"
run 2 "$attn" train --task mqar --data text --out bad
run 2 "$attn" train --task recite --out bad
says err "selective_copying"
run 2 "$attn" eval recall --task recite
says err "selective_copying"
run 1 "$attn" train --task parity --pairs 3 --out bad --config config.json --steps 3
says err "pairs"
run 1 "$attn" eval recall --task copying --power 1
says err "power"
run 2 "$attn" train --data text --zeros --out bad
for task in copying selective_copying parity permutations passkey niah1 niah2 niah3; do
  run 0 "$attn" train --task $task --length 40 --out $task --config config.json --batch 2 --steps 2 \
    --validation-windows 2 --quiet
  run 0 "$attn" eval $task --task $task --length 40 --examples 10 --json
  key $task task
  has accuracy
done
run 2 "$attn" train --task mqar --validation 0.2 --out bad
run 2 "$attn" train --data text --pairs 3 --out bad

run 1 "$attn" train --data text --out nothing $small --steps 3 --resume
says err "nothing"
run 1 "$attn" train --data no-such-file --out bad $small --steps 3
says err "no-such-file"
run 1 "$attn" train --data text --out text $small --steps 3
says err "text"
run 1 "$attn" train --data text --out bad --config no-such-config --steps 3
says err "no-such-config"
echo '{"vocab_size": 256, "hidden_sise": 32}' >wrong.json
run 1 "$attn" train --data text --out bad --config wrong.json --steps 3
says err "hidden_sise"
run 1 "$attn" train --data text --out bad --config config.json --steps 3 --length 1M
run 1 "$attn" train --data text --out bad --model no-such-model --steps 3
says err "no-such-model"
run 1 "$attn" train --data text --out made $small --steps 3 --batch 3
says err "batch"

finish
