# attn compare: mixers on a task; files, JSON, interruption, a mixer that fails, bad input.
. "$(dirname "$0")/support.sh"

small="--task mqar --vocabulary 16 --length 16 --pairs 2 --width 16 --batch 2 --test-examples 20
  --validation-examples 4"

run 0 "$attn" compare $small --mixers softmax,lightning,kda --steps 3 --seeds 2 \
  --learning-rates 1e-3,0.01 --out first
says out "mqar"
says out "kda"
[ "$(grep -c '/12 .*accuracy' err)" = 12 ] || fail "expected one line for each of 12 runs"
[ "$(ls first/runs | wc -l)" = 12 ] || fail "expected 12 runs"
run=first/runs/kda-seed2-rate0.01
for file in run.json config.json model.safetensors loss.svg loss.csv; do
  [ -s $run/$file ] || fail "$run/$file is missing"
done
[ -e $run/training.safetensors ] && fail "the checkpoint of a finished run is still there"
grep -q '<svg' first/report.html && grep -q '</html>' first/report.html && grep -q 'kda' first/report.html ||
  fail "report.html lacks its parts"
grep -q -e 'src=' -e 'href=' first/report.html && fail "report.html needs other files"
run 0 "$attn" eval $run --task mqar --length 16 --pairs 2 --examples 20 --json
has accuracy
accuracy=$(cat value)
cp first/results.json out
key 12 runs
key 2 learning_rates
key "$accuracy" runs 11 accuracy

# The same again does nothing; elsewhere, the same accuracies.
run 0 "$attn" compare $small --mixers softmax,lightning,kda --steps 3 --seeds 2 \
  --learning-rates 1e-3,0.01 --out first --json --html folder/page.html
[ "$(grep -c 'done before' err)" = 12 ] || fail "runs that were over are done again"
grep -q '<svg' folder/page.html || fail "--html writes no page"
cmp -s out first/results.json || fail "--json and results.json differ"
run 0 "$attn" compare $small --mixers softmax,lightning,kda --steps 3 --seeds 2 \
  --learning-rates 1e-3,0.01 --out second --quiet
[ -s err ] && fail "--quiet prints on standard error"
cat >look.py <<'END'
import json, sys
first, second = (json.load(open(name)) for name in ("first/results.json", "second/results.json"))
one, two = ([(r["name"], r["accuracy"], r["validation_loss"]) for r in x["runs"]] for x in (first, second))
assert one == two, (one, two)
rows = first["rows"]
assert {r["mixer"] for r in rows} == {"softmax", "lightning", "kda"}
means = [r["accuracy"]["mean"] for r in rows]
assert means == sorted(means, reverse=True), means
largest = max(r["parameters"] for r in rows)
assert all(r["parameters"] >= 0.98 * largest for r in rows)
for r in rows:
    a = r["accuracy"]
    assert len(a["seeds"]) == 2 and a["least"] == min(a["seeds"]) and a["most"] == max(a["seeds"])
    assert abs(a["mean"] - sum(a["seeds"]) / 2) < 1e-12
    state = r["state_bytes"]
    assert state["at_length"] == state["fixed"] + 16 * state["per_token"] > 0
    losses = {}
    for run in first["runs"]:
        if run["mixer"] == r["mixer"]:
            losses.setdefault(run["learning_rate"], []).append(run["validation_loss"])
    assert r["learning_rate"] == min(losses, key=lambda rate: sum(losses[rate]))
END
python3 look.py 2>err || fail "the results are not what they should be"

# Another seed and another mixer are added; other options are refused, or begin afresh.
run 0 "$attn" compare $small --mixers softmax,lightning,kda --steps 3 --seeds 3 \
  --learning-rates 1e-3 --out first
[ "$(grep -c 'done before' err)" = 6 ] || fail "a seed more does the others again"
run 1 "$attn" compare $small --mixers softmax,lightning,kda --steps 4 --seeds 1 \
  --learning-rates 1e-3 --out first
says err "steps is 3 there and 4 here"
run 0 "$attn" compare $small --mixers softmax,lightning,kda --steps 4 --seeds 1 \
  --learning-rates 1e-3 --out first --fresh
grep -q 'done before' err && fail "--fresh takes what is there"

# Ctrl-C: what is over is kept, the run in progress goes on from its checkpoint, to the same bits.
long="$small --mixers lightning,softmax --steps 150 --seeds 1 --learning-rates 0.01 --checkpoint-every 0"
run 0 "$attn" compare $long --out whole --quiet
"$attn" compare $long --out stopped >out 2>err </dev/null &
pid=$!
tries=0
until [ -e stopped/runs/softmax-seed1-rate0.01/run.json ] || [ $tries = 500 ]; do
  sleep 0.02
  tries=$((tries + 1))
done
kill -INT "$pid"
wait "$pid"
code=$?
if [ "$code" = 130 ]; then
  says err "stopped after 1 of 2 runs"
  [ -s stopped/runs/softmax-seed1-rate0.01/training.safetensors ] || fail "there is no checkpoint"
elif [ "$code" != 0 ]; then # on a fast machine it may have been done before
  fail "exit code $code after Ctrl-C, expected 130"
fi
run 0 "$attn" compare $long --out stopped
says err "1/2 lightning, seed 1, learning rate 0.01: accuracy"
grep '1/2' err | grep -q 'done before' || fail "a run that was over is done again"
for run in lightning softmax; do
  cmp -s whole/runs/$run-seed1-rate0.01/model.safetensors stopped/runs/$run-seed1-rate0.01/model.safetensors ||
    fail "interrupted and resumed gives other weights of $run"
done

# A mixer that cannot have as many parameters, and a loss that diverges, lose nothing of the others.
run 1 "$attn" compare --task parity --length 8 --mixers softmax,gla --width 4 --heads 4 --steps 3 \
  --seeds 1 --learning-rates 1e-3 --test-examples 4 --out half
says out "failed: softmax: 444 parameters"
says err "1 of 2 mixers failed"
cp half/results.json out
key gla rows 0 mixer
key null rows 0 problem
key softmax rows 1 mixer
key null rows 1 accuracy mean
grep -q '<svg' half/report.html && grep -q 'softmax failed' half/report.html ||
  fail "report.html lacks the chart or the failure"
run 1 "$attn" compare $small --mixers softmax --steps 30 --seeds 1 --learning-rates 1000 --out wild
says out "not finite"
run 1 "$attn" compare $small --mixers softmax --steps 30 --seeds 1 --learning-rates 1000 --out wild
says err "done before"
run 0 "$attn" compare $small --mixers softmax --steps 30 --seeds 1 --learning-rates 1000,1e-3 --out wild
grep -q '<svg' wild/report.html || fail "report.html lacks its chart"

run 2 "$attn" compare --mixers softmax --out bad
run 2 "$attn" compare --task mqar --out bad
run 2 "$attn" compare --task mqar --mixers softmax
run 2 "$attn" compare $small --mixers softmax,lightening --out bad
says err "lightening"
run 2 "$attn" compare --task recite --mixers softmax --out bad
run 2 "$attn" compare $small --mixers softmax --learning-rates 1e-3,x --out bad
[ -e bad ] && fail "a wrong command line makes a directory"
run 1 "$attn" compare $small --mixers softmax,softmax --out bad
says err "twice"
run 1 "$attn" compare --task parity --pairs 3 --mixers softmax --out bad
says err "pairs"
run 1 "$attn" compare $small --mixers softmax --steps 3 --out /dev/null/bad
mkdir -p broken/runs/softmax-seed1-rate0.001
echo '{"options": {}, "result": 3}' >broken/runs/softmax-seed1-rate0.001/run.json
run 1 "$attn" compare $small --mixers softmax --steps 3 --seeds 1 --learning-rates 1e-3 --out broken
says err "run.json"

# CAB's index of a file.
run 0 "$attn" compare --cab "$source_directory/examples/cab.json"
says out "-0.301"
says out "0.528"
run 0 "$attn" compare --cab "$source_directory/examples/cab.json" --json
key vanilla baseline
has attentions vanilla NS index
run 2 "$attn" compare --cab "$source_directory/examples/cab.json" --task mqar
run 1 "$attn" compare --cab nothing.json
echo '{"attentions": {"x": {"NS": {"TTS": [1]}}}}' >wrong.json
run 1 "$attn" compare --cab wrong.json
says err "4 numbers"

finish
