# attn convert: directories and GGUF files into each other, in one file and in several.
. "$(dirname "$0")/support.sh"

families="$source_directory/tests/models/fixtures/families"

write() { "$attn" run "$1" --prompt user -n 12 --dtype float32 --ignore-end --seed 3 >"$2" 2>err || fail "running $1"; }

# A GGUF file, a directory, a GGUF file: the same text, also by a model in several files.
run 0 "$attn" convert "$families/llama/model.gguf" directory
run 0 "$attn" convert directory back.gguf
says out "back.gguf: 96.6 KiB in 1 file; 21 tensors F32"
run 0 "$attn" convert back.gguf part.gguf --split 50K
says out "part-00001-of-0000"
[ ! -e part.gguf ] || fail "part.gguf beside its parts"
write "$families/llama/model.gguf" expected
for model in directory back.gguf part-00002-of-*.gguf; do
  write "$model" text
  cmp -s text expected || fail "$model writes another text"
done
rm part-00001-of-*.gguf
run 1 "$attn" run part-00002-of-*.gguf --prompt x
says err "is missing"
says err "part-00001-of"

# A directory in several files, and again in one; other files stay.
run 0 "$attn" convert directory shards --split 40K
ls shards/model-00001-of-0000?.safetensors shards/model.safetensors.index.json >/dev/null 2>&1 || fail "no shards"
[ ! -e shards/model.safetensors ] || fail "model.safetensors beside its shards"
write shards text
cmp -s text expected || fail "shards write another text"
touch shards/note
run 0 "$attn" convert shards shards --split 20K
write shards text
cmp -s text expected || fail "other shards write another text"
run 0 "$attn" convert shards shards --split 0
[ "$(ls shards/*.safetensors* | wc -l)" = 1 ] || fail "shards beside model.safetensors"
[ -e shards/note ] || fail "a file that is not of weights was removed"
write shards text
cmp -s text expected || fail "one file writes another text"

# float8 becomes bfloat16, or what is asked for.
run 0 "$attn" info "$families/deepseek_v3_fp8" --json
key float8_e4m3 stored
run 0 "$attn" convert "$families/deepseek_v3_fp8" plain
run 0 "$attn" info plain --json
key bfloat16 stored
run 0 "$attn" convert "$families/llama_float8" plain
run 0 "$attn" info plain --json
key bfloat16 stored

# Types; rows that are not whole blocks are told of.
run 0 "$attn" convert "$families/llama" small.gguf --type q8_0
says out "5 tensors F32, 16 tensors Q8_0"
run 0 "$attn" convert "$families/llama_tied" odd.gguf --type q4_0
says out "2 matrices are F16: rows that are not whole blocks of 32"
run 0 "$attn" convert small.gguf widened --type f32
run 0 "$attn" info widened --json
key float32 stored
run 0 "$attn" convert small.gguf halved
run 0 "$attn" info halved --json
key float16 stored
run 0 "$attn" info odd.gguf --json
key Q4_0 blocks 2 type

# What a model advises counts where the user says nothing, in a directory as in a GGUF file.
echo '{"do_sample": false, "max_new_tokens": 5, "top_k": 3}' >directory/generation_config.json
run 0 "$attn" convert directory advised.gguf
for model in directory advised.gguf; do
  run 0 "$attn" run "$model" --prompt user --ignore-end --explain
  says err "sampling: temperature 0, top-k 3, top-p 0.95"
  says err "the model advises some of it"
  run 0 "$attn" run "$model" --prompt user --ignore-end --explain -t 0.5 --top-k 0
  says err "sampling: temperature 0.5, top-k 0, top-p 0.95"
done
run 0 "$attn" run directory --prompt user --ignore-end --json
key 5 tokens
run 0 "$attn" run directory --prompt user --ignore-end --json -n 7
key 7 tokens
echo '{"top_p": 2}' >directory/generation_config.json
run 1 "$attn" run directory --prompt user
says err 'generation_config.json: "top_p"'

# Another mixer, in the tokens of the model.
for i in 1 2 3 4 5 6 7 8 9; do echo "the user said that the model is a user of the model"; done >text
run 0 "$attn" convert "$families/llama/model.gguf" hedgehog --to hedgehog --data text --steps 4 --batch 2 --length 8 \
  --validation 0.3 --dtype float32 --json
key hedgehog mixer
key hedgehog model
says err "step 4/4"
run 0 "$attn" run hedgehog --prompt user --ignore-end --json -n 7
key 7 tokens
run 0 "$attn" info hedgehog
says out "hedgehog"
run 0 "$attn" convert "$families/llama/model.gguf" kept --to lawcat --keep-every 1 --data text --steps 0 --length 8 --quiet \
  --dtype float32
says out "before"
run 0 "$attn" convert "$families/llama/model.gguf" window --to lolcats --window 4 --window-kind sliding --affine --feature-dim 8 --data text \
  --steps 2 --batch 2 --length 16 --quiet --dtype float32
says out "after attention transfer"
run 0 "$attn" info window
says out "lolcats"
run 0 "$attn" run window --prompt user --ignore-end --json -n 20
key 20 tokens
run 1 "$attn" convert "$families/llama" refused --to hedgehog --window 4 --data text --length 8
says err "hedgehog has no window"
run 1 "$attn" convert "$families/qwen2" refused --to lawcat --data text --length 8
says err "q_proj.bias, which lawcat has not"
run 2 "$attn" convert kept refused --window-kind sliding
says err "without --to"
run 2 "$attn" convert kept refused --to hedgehog
says err "--to needs --data"
run 2 "$attn" convert kept refused.gguf --to hedgehog --data text
says err "--to writes a directory"
run 2 "$attn" convert kept refused --data text
run 2 "$attn" convert kept refused --steps 3
says err "without --to"
run 2 "$attn" convert kept refused --json
run 2 "$attn" convert kept refused --to hedgehog --data text --type f32
says err "--save-dtype"
run 1 "$attn" convert kept refused --to kda --data text --length 8
says err "kda"
[ ! -e refused ] || fail "what was refused was written"

# Refusals.
run 1 "$attn" convert "$families/gemma2" gemma2.gguf
says err "gemma2"
run 1 "$attn" convert "$families/qwen2_window" window.gguf
says err "windows"
run 1 "$attn" convert absent x.gguf
says err "absent"
run 2 "$attn" convert directory
run 2 "$attn" convert directory out --type q8_0
says err "needs a .gguf file"
run 2 "$attn" convert directory x.gguf --type q5_k
says err "q8_0"

finish
