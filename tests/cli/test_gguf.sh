# attn info of GGUF files: the fixture of the unit test, and damaged ones.
. "$(dirname "$0")/support.sh"

fixture="$source_directory/tests/unit/fixtures/small.gguf"

run 0 "$attn" info "$fixture"
says out "llama, vocabulary 5"
says out "file type Q8_0"
says out "context         2048 tokens"
says out "tokenizer       gpt2"
says out "small é"
says out "string[5]"
# A NUL in a string is not printed as it is.
if [ "$(tr -d '\000' <out | wc -c)" != "$(wc -c <out)" ]; then fail "a NUL reaches the terminal"; fi

run 0 "$attn" info --json "$fixture"
key GGUF format
key 3 version
key llama type
key "small é" name
key 35 tensors
key Q8_0 file_type
key 2048 context_length
key 5 vocabulary
key gpt2 tokenizer
key null layers
key F32 blocks 0 type
key 17 blocks 0 tensors
key F16 blocks 1 type
key 400 blocks 1 bytes
key Q4_0 blocks 2 type
key 320 blocks 2 elements
key $((320 / 32 * 18)) blocks 2 bytes
key -100 metadata test.int8
key true metadata test.bool
key string metadata tokenizer.ggml.tokens array
key 5 metadata tokenizer.ggml.tokens count

key null hidden

# It has no sizes: no model can be made of it, and the reason is said.
run 0 "$attn" info "$fixture"
says out "not loadable"
says out '"llama.embedding_length" is missing'

# A model: what attn info says of any, and the types of its tensors.
model="$source_directory/tests/models/fixtures/families/llama/model.q8_0.gguf"
run 0 "$attn" info "$model"
says out "type            llama, width 32, vocabulary 96"
says out "Q8_0; computed in bfloat16"
says out "layers          0-1 softmax"
says out "context memory"
says out "Q8_0        16 tensors"
run 0 "$attn" info --json "$model"
key llama type
key Q8_0 stored
key softmax mixers 1
key 2 layers
key 16 blocks 1 tensors
key "$((2 * 2 * 2 * 8 * 2))" state_bytes per_token # layers, k and v, heads, width, bfloat16

# Damaged files.
head -c 100 "$fixture" >short.gguf
run 1 "$attn" info short.gguf
says err "short.gguf"
says err "are left"
head -c 9000 "$fixture" >cut.gguf
run 1 "$attn" info --json cut.gguf
says err "outside the data"
echo "no such thing" >text.gguf
run 1 "$attn" info text.gguf
says err 'expected "GGUF"'
: >empty.gguf
run 1 "$attn" info empty.gguf
run 1 "$attn" info absent.gguf
says err "absent.gguf"
mkdir directory.gguf # a directory is a model, whatever its name
run 1 "$attn" info directory.gguf
says err "config.json"

# Without a key at all.
printf 'GGUF\003\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000' >bare.gguf
run 0 "$attn" info bare.gguf
says out "type            unknown"
run 0 "$attn" info bare.gguf --json
key null type
key 0 parameters
key null vocabulary

finish
