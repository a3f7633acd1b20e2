# attn bench: every mixer and pass at a small size, its JSON, files, and options.
. "$(dirname "$0")/support.sh"

small="--heads 2 --dim 16 --budget 60 --seconds 0.01"
run 0 "$attn" bench --mixer all --pass forward,backward,step --dtype bfloat16,float32 $small \
  --lengths 64,200 --json --svg chart.svg --html page.html
key 0 skipped
key 72 rows
has machine copy_bytes_per_second
has machine bfloat16_flop_per_second
key softmax rows 0 mixer
key forward rows 0 pass
key 64 rows 0 length
for number in seconds tokens_per_second extra_bytes flop bytes fraction_of_peak fraction_of_copy \
  error repeats plan; do
  has rows 71 "$number"
done
grep -q '<svg' chart.svg || fail "chart.svg is no SVG"
grep -q '</html>' page.html && grep -q '<svg' page.html || fail "page.html lacks its parts"

run 0 "$attn" bench $small --lengths 64,128 --demo --svg folder/chart.svg --explain
says out "plan: softmax"
says out "plan: recurrent"
says out "Exact attention compares"
[ -s folder/chart.svg ] || fail "--svg does not make its directory"

run 0 "$attn" bench --layer --mixer all --pass forward,backward,step $small --lengths 200 --json
key layer level
key 42 rows
key 0 skipped
has rows 41 flop
run 0 "$attn" bench --efficiency-length --mixer lightning $small --lengths 16,32,64,128
says out "efficiency length"
run 0 "$attn" bench --efficiency-length --mixer lightning,gla $small --lengths 16,32,64,128 --json
key lightning efficiency_lengths 0 mixer
has efficiency_lengths 1 time exact 2
has efficiency_lengths 1 memory length
key 12 rows
run 0 "$attn" bench --efficiency-length --mixer lightning $small --lengths 16,32 --json
key null efficiency_lengths 0 time
run 2 "$attn" bench --efficiency-length --pass step $small --lengths 16
run 2 "$attn" bench --mixer lolcats $small --lengths 16
says err "lolcats is measured as a layer: --layer"
run 0 "$attn" bench --layer --mixer lolcats,lawcat --kv-heads 1 $small --lengths 200
run 1 "$attn" bench --layer --pass step --batch 2 $small --lengths 16
says err "--batch is 2"

run 0 "$attn" bench $small --mixer lightning --lengths 64 --path generic --dtype float64
says out "generic"
run 0 "$attn" bench $small --mixer softmax --lengths 64 --kv-heads 1 --batch 2 --json
key 1 rows 0 kv_heads
key 2 rows 0 batch
run 0 "$attn" bench --mixer softmax --lengths 1K,1G --heads 2 --dim 16 --budget 2
says out "rows left out"
run 1 "$attn" bench $small --lengths 64 --svg /dev/null/chart.svg
run 130 timeout --foreground --preserve-status -s INT 1.5 "$attn" bench --mixer all --budget 100 --heads 4 \
  --pass forward,backward --json
has rows

finish
