# attn embed: encoders from both kinds of file, where texts come from, and what is refused.
. "$(dirname "$0")/support.sh"

encoders="$source_directory/tests/models/fixtures/encoders"
model="$encoders/sentences"

# A line of numbers for each text, of length 1 as the model's files say.
run 0 "$attn" embed "$model" "a cat" "The dogs running" ""
awk '{ s = 0; for (i = 1; i <= NF; ++i) s += $i * $i; if (NF != 32 || s < 0.9999 || s > 1.0001) exit 1 }' out ||
  fail "three lines of 32 numbers of length 1"
[ "$(wc -l <out)" = 3 ] || fail "three lines"
cp out words

# The same from a file, with any line ends, and from standard input.
printf 'a cat\r\nThe dogs running\n\n' >texts
run 0 "$attn" embed "$model" --file texts
cmp -s out words || fail "a file gives other numbers than words"
"$attn" embed "$model" <texts >out 2>err || fail "standard input"
cmp -s out words || fail "standard input gives other numbers than words"
"$attn" embed "$model" --file - --stats <texts >out 2>err || fail "--file -"
says err "3 texts, 13 tokens, 0 texts cut; mean pooling, normalised"

# More lines than are read at once give what each gives alone, up to rounding.
awk 'BEGIN { for (i = 0; i < 700; ++i) print "cat dog " i % 3 }' >many
run 0 "$attn" embed "$model" --file many
[ "$(wc -l <out)" = 700 ] || fail "700 lines"
tail -n 1 out >last
run 0 "$attn" embed "$model" "cat dog 0"
paste -d ' ' out last | awk '{ for (i = 1; i <= 32; ++i) { d = $i - $(i + 32); if (d * d > 1e-10) exit 1 } }' ||
  fail "the last of many differs"

# JSON, the text cut at 16 tokens.
run 0 "$attn" embed "$model" "a cat" "$(cat many)" --json
key 32 size
key mean pooling
key true normalized
key 16 most_tokens
key 4 tokens 0
key 16 tokens 1
key 1 cut
has embeddings 1 31

# GGUF, whose metadata do not speak of length.
run 0 "$attn" embed "$encoders/sentences/model.gguf" "a cat" --json
key false normalized
key 4 tokens 0
run 0 "$attn" embed "$encoders/sentences/model.gguf" --normalize "a cat" "The dogs running" ""
paste -d ' ' out words | awk '{ for (i = 1; i <= 32; ++i) { d = $i - $(i + 32); if (d * d > 1e-10) exit 1 } }' ||
  fail "GGUF differs from safetensors"
run 0 "$attn" embed "$model" --pooling cls --no-normalize --dtype bfloat16 --json x
key cls pooling
key false normalized

# Decoders embed too, with their own tokens.
run 0 "$attn" embed "$source_directory/tests/models/fixtures/families/llama/model.gguf" "user" --pooling last --json
key 2 tokens 0
key last pooling
run 1 "$attn" embed "$source_directory/tests/models/fixtures/families/llama/model.gguf" "user" ""
says err "text 2 is empty"

# What an encoder does not do.
run 1 "$attn" run "$model" --prompt x
says err "is an encoder"
run 1 "$attn" eval "$model" --data texts
says err "is an encoder"
run 0 "$attn" info "$model"
says out "bert"

run 2 "$attn" embed
run 2 "$attn" embed "$model" x --file texts
run 2 "$attn" embed "$model" x --normalize --no-normalize
run 2 "$attn" embed "$model" x --pooling median
run 1 "$attn" embed "$model" --file nothing
says err "nothing"
run 1 "$attn" embed nothing x
cp -r "$model" dense
sed 's/models.Normalize/models.Dense/' "$model/modules.json" >dense/modules.json
run 1 "$attn" embed dense x
says err "the module 'Dense' is not offered"

finish
