# attn run and attn eval of models as people have them: GGUF files and Hugging Face directories.
. "$(dirname "$0")/support.sh"

families="$source_directory/tests/models/fixtures/families"
gguf="$families/llama/model.q8_0.gguf"

run 0 "$attn" run "$gguf" --prompt "user" -n 8 -t 0 --json --ignore-end
key 2 prompt_tokens # "us" and "er" are tokens
key 8 tokens
key length stopped

# The same weights in both kinds of file write the same text.
run 0 "$attn" run "$families/llama/model.gguf" --prompt "user" -n 8 -t 0 --dtype float32 --ignore-end
cp out from_gguf
mkdir both
cp "$families/llama/config.json" "$families/llama/model.safetensors" both
run 1 "$attn" eval both --data "$families/llama/config.json" # no tokenizer: bytes, above 96
says err "token"

# A chat by the template in the file; turns come from standard input.
run 0 "$attn" run "$gguf" --chat --prompt "users" -n 4 -t 0 --json --ignore-end
key 4 tokens
printf 'user\n\nusers\n/new\nuser\n/quit\nnever\n' >turns
"$attn" run "$gguf" --chat -n 3 -t 0 --ignore-end --stats <turns >out 2>err || fail "a chat of three turns"
says err "text: 9 tokens"
"$attn" run "$gguf" --chat --max-context 20 -n 30 -t 0 --ignore-end <turns >out 2>err
says err "context of 20 tokens is full"

run 2 "$attn" run "$gguf" --system "x"
says err "--chat"
run 2 "$attn" run "$gguf" --chat --json
run 1 "$attn" run both --chat --prompt "x"
says err "chat template"

# Perplexity counts the model's tokens and the text's bytes.
printf 'users use user users' >text
run 0 "$attn" eval "$gguf" --data text --json
key 12 tokens # us er s, space us e, space us er, space us er s: all but the first

# Files that are not what they say.
head -c 5000 "$gguf" >short.gguf
run 1 "$attn" run short.gguf --prompt x
says err "short.gguf"
sed 's/"silu"/"relu"/' "$families/llama/config.json" >both/config.json
run 1 "$attn" run both --prompt x
says err "hidden_act"
sed 's/"llama"/"lama"/' "$families/llama/config.json" >both/config.json
run 1 "$attn" run both --prompt x
says err "model_type"

sed 's/"hidden_act"/"partial_rotary_factor": 0.5, "hidden_act"/' "$families/llama/config.json" >both/config.json
run 1 "$attn" run both --prompt x
says err "partial_rotary_factor"

# A tensor without a place would be left out of the computation.
mkdir biased
cp "$families/llama_tied/model.safetensors" biased
sed 's/"attention_bias": true/"attention_bias": false/' "$families/llama_tied/config.json" >biased/config.json
run 1 "$attn" run biased --prompt x
says err "no place for the tensor model.layers.0.self_attn"

finish
