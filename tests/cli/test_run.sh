# attn run, info and eval on a small model; sessions, seeds, bad files, Ctrl-C.
. "$(dirname "$0")/support.sh"

"$make_model" model "$tiny_config" || exit 1
"$make_model" other "$tiny_config" 2 || exit 1

# Text and seeds.
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 7
cp out first
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 7
cmp -s out first || fail "the same seed gives another text"
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 8
cmp -s out first && fail "another seed gives the same text"
printf Hello >prompt
run 0 "$attn" run model --prompt-file prompt -n 40 --seed 7
cmp -s out first || fail "--prompt-file differs from --prompt"
"$attn" run model -n 40 --seed 7 <prompt >out 2>err
cmp -s out first || fail "a prompt on standard input differs from --prompt"
"$attn" run model --prompt-file - -n 40 --seed 7 <prompt >out 2>err
cmp -s out first || fail "--prompt-file - differs from --prompt"
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 7 --echo
{ printf Hello; cat first; } | cmp -s - out || fail "--echo is not the prompt and the text"
run 0 "$attn" run model --prompt "Hello" -n 10 --temperature 0
cp out greedy
run 0 "$attn" run model --prompt "Hello" -n 10 --top-k 1 --seed 3
cmp -s out greedy || fail "top-k 1 differs from greedy"
run 0 "$attn" run model -n 0
[ -s out ] && fail "no tokens were asked for"
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 7 --threads 1 --dtype float32
[ "$(wc -c <out)" -ge 40 ] || fail "fewer bytes than tokens"

# JSON, statistics, plans.
run 0 "$attn" run model --prompt "Hello" -n 40 --seed 7 --json
key length stopped
key 40 tokens
key 5 prompt_tokens
key 45 position
key 7 seed
key Hello prompt
"$json" text <out >text
cmp -s text first || fail "the text of --json differs"
run 0 "$attn" run model --prompt "Hello" -n 4 --stats --explain
says err "tokens/s"
says err "plan: recurrent"
says err "plan: softmax"
run 0 "$attn" run model --prompt "Hello" -n 400 --max-context 20 --json
key context stopped
key 15 tokens
says err "the context of 20 tokens is full"
run 1 "$attn" run model --prompt "longer than the context" --max-context 4
says err "4"

# Bytes that are no UTF-8 arrive as U+FFFD.
"$make_model" bytes '{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1}' || exit 1
run 0 "$attn" run bytes --prompt "x" -n 300 --seed 1
if command -v iconv >/dev/null; then
  iconv -f UTF-8 -t UTF-8 out >/dev/null 2>&1 || fail "the text is not valid UTF-8"
fi
run 0 "$attn" run bytes --prompt "x" -n 300 --seed 1 --json
has text

# echoes PROMPT EXPECTED: both with the escapes of printf.
echoes() {
  printf "$1" >prompt
  printf "$2" >expected
  run 0 "$attn" run bytes --prompt-file prompt -n 0 --echo
  cmp -s out expected || fail "bytes $1 are printed as $(od -An -tx1 out)"
}
bad='\357\277\275'                                             # U+FFFD
echoes 'a\303\251\342\202\254\360\237\230\200z' 'a\303\251\342\202\254\360\237\230\200z' # all lengths
echoes '\377a' "${bad}a"                                         # no first byte
echoes '\303a' "${bad}a"                                         # cut off by a letter
echoes '\303\303\251' "$bad\303\251"                           # cut off by another sequence
echoes 'a\342\202' "a$bad"                                       # cut off by the end
echoes '\300\200' "$bad$bad"                                     # a longer form than needed
echoes '\340\200\200' "$bad$bad$bad"
echoes '\355\240\200' "$bad$bad$bad"                             # a surrogate
echoes '\364\220\200\200' "$bad$bad$bad$bad"                     # beyond U+10FFFF
echoes '\033[2J' '\033[2J'                                      # only terminals are protected

# Sessions: 10 tokens and 10 more are 20.
run 0 "$attn" run model --prompt "Once" -n 20 --seed 5 --save-session whole
cp out text20
run 0 "$attn" run model --prompt "Once" -n 10 --seed 5 --save-session half
cp out text10
run 0 "$attn" run model --load-session half -n 10 --seed 5 --save-session joined
cat text10 out | cmp -s - text20 || fail "a session goes on with another text"
cmp -s whole joined || fail "a session that was resumed differs"
run 0 "$attn" run model --load-session half --prompt " and" -n 5 --json
key $((4 + 10 + 4 + 5)) position
run 1 "$attn" run other --load-session half -n 1
run 1 "$attn" run model --load-session no-such-session
says err "no-such-session"
head -c 100 half >short
run 1 "$attn" run model --load-session short -n 1
says err "short"
run 1 "$attn" run model -n 1 --save-session no/such/directory/session
says err "no/such/directory/session"

# info.
run 0 "$attn" info model
says out "lightning"
says out "context memory"
run 0 "$attn" info model --json
key 2 layers
key 128 vocabulary
key float32 stored
key bfloat16 compute
key lightning mixers 0
key softmax mixers 1
key $((2 * 16 * 16 * 4)) state_bytes fixed
key $((2 * 32 * 2)) state_bytes per_token
key $((2048 + 1048576 * 128)) context_memory 2 bytes
key 32 config hidden_size

# eval: a fresh model knows nothing, so a byte costs about log2(128) = 7 bits.
awk 'BEGIN { for (i = 0; i < 200; i++) print "The quick brown fox jumps over the lazy dog", i }' >text
run 0 "$attn" eval model --data text --window 256
says out "bits per byte"
run 0 "$attn" eval model --data text --window 256 --overlap 64 --limit 2000 --json
key 1999 tokens
"$json" bits_per_byte <out >bits
awk '{ exit !($1 > 6 && $1 < 8) }' bits || fail "bits per byte is $(cat bits), expected about 7"
run 1 "$attn" eval model --data no-such-file
says err "no-such-file"
: >empty
run 1 "$attn" eval model --data empty
run 1 "$attn" eval no-such-model --data text
says err "no-such-model"

# eval --task: a fresh model guesses.
run 0 "$attn" eval model --task mqar --examples 50 --length 32 --pairs 4
says out "accuracy"
run 0 "$attn" eval model --task mqar --examples 200 --length 32 --pairs 4 --json
key mqar task
key 128 vocabulary
"$json" accuracy <out >accuracy
awk '{ exit !($1 >= 0 && $1 < 0.1) }' accuracy || fail "accuracy is $(cat accuracy), expected about 1/128"
run 0 "$attn" eval model --task mqar --examples 200 --length 32 --pairs 4 --json
"$json" accuracy <out | cmp - accuracy || fail "the same seed gives another accuracy"
run 1 "$attn" eval model --task mqar --length 32 --pairs 9
says err "9 pairs"
run 1 "$attn" eval model --task mqar --vocabulary 1000
says err "the model has 128"
run 2 "$attn" eval model --task mqar --data text
run 2 "$attn" eval model --task mqar --window 512
run 2 "$attn" eval model --data text --pairs 3

# Bad models.
run 1 "$attn" run no-such-model
says err "there is no model no-such-model"
run 1 "$attn" run text
says err "expected the directory of a model"
run 1 "$attn" run
says err "ATTN_MODELS"
mkdir hollow
run 1 "$attn" run hollow
says err "config.json"
cp -r model damaged
head -c 1000 model/model.safetensors >damaged/model.safetensors
run 1 "$attn" run damaged
says err "model.safetensors"
: >damaged/model.safetensors
run 1 "$attn" info damaged
cp model/model.safetensors damaged/
echo '{"vocab_size": 128,' >damaged/config.json
run 1 "$attn" run damaged
says err "config.json"
echo '{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}' >damaged/config.json
run 1 "$attn" run damaged
echo '{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "mixer": "lightening"}' \
  >damaged/config.json
run 1 "$attn" run damaged
says err "lightening"
"$make_model" wide '{"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}' || exit 1
run 1 "$attn" run wide
says err "vocabulary of 300"
run 1 "$attn" run model --prompt "$(printf '\303\251')" -n 1
says err "195"

# The model that comes with attn, where ATTN_MODELS says.
mkdir models
cp -r model models/lightning-english
ATTN_MODELS="$work/models" run 0 "$attn" run -n 3 --seed 1
ATTN_MODELS="$work/models" run 0 "$attn" info --json
key "$work/models/lightning-english" model

# Ctrl-C ends the text, and the session is saved. --foreground: otherwise timeout signals its whole group
# too, and a second Ctrl-C quits at once.
run 130 timeout --foreground --preserve-status -s INT 1 "$attn" run model -n 100M --seed 1 --json \
  --save-session stopped
key interrupted stopped
[ -s stopped ] || fail "no session after Ctrl-C"
run 0 "$attn" run model --load-session stopped --max-context 1M -n 3

finish
