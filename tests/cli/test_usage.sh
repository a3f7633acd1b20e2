# Help, versions, lists, wrong usage; and what is generated from the tables is up to date.
. "$(dirname "$0")/support.sh"

run 0 "$attn" --version
says out "attn "
run 0 "$attn" --help
says out "usage: attn COMMAND"
run 2 "$attn"
says err "usage: attn COMMAND"
run 2 "$attn" rum
says err "no command 'rum'"
says err "run"
run 2 "$attn" help trian
says err "train"

for command in run serve train eval bench list info help; do
  run 0 "$attn" "$command" --help
  says out "usage: attn $command"
  says out "examples:"
  cp out direct
  if [ "$(awk '{ if (length($0) > 80) n++ } END { print n + 0 }' out)" != 0 ]; then
    fail "attn $command --help is wider than 80 columns"
  fi
  run 0 "$attn" help "$command"
  cmp -s out direct || fail "attn help $command differs from attn $command --help"
  run 2 "$attn" "$command" --no-such-option
  says err "unknown option --no-such-option"
  says err "attn $command --help"
done

run 2 "$attn" run --temprature 1
says err "close: temperature"
run 2 "$attn" run --temperature
says err "--temperature needs a value"
run 2 "$attn" run --temperature hot
says err "'hot', expected a number"
run 2 "$attn" run --top-p 2
says err "--top-p is 2, expected"
run 2 "$attn" run --tokens 1.5
says err "expected an integer"
run 2 "$attn" run -n -3
says err "expected 0 to"
run 2 "$attn" run --dtype bflot16
says err "close: bfloat16"
run 2 "$attn" run --json=yes
says err "takes no value"
run 2 "$attn" run one two
says err "unexpected word 'two'"
run 2 "$attn" run --prompt a --prompt-file b
says err "exclude each other"
run 2 "$attn" run --seed -1
says err "expected an integer from 0"
run 2 "$attn" list --heads 99999999999999999999
says err "expected an integer"
run 2 "$attn" bench --lengths 1K,,2K
says err "numbers with commas"
run 2 "$attn" bench --mixer lightening
says err "close: lightning"
run 2 "$attn" bench --heads 6 --kv-heads 4
says err "not a multiple"
run 2 "$attn" train --out there
says err "--data is missing"
run 2 "$attn" train --data here
says err "--out is missing"
run 2 "$attn" train --data here --out there --schedule cosin
says err "close: cosine"
run 2 "$attn" train --data here --out there --resume --fresh
says err "exclude each other"
run 2 "$attn" eval
says err "--data is missing"
run 2 "$attn" eval --data x --window 16 --overlap 15
says err "--overlap is 15"

# The mixers.
run 0 "$attn" list
says out "lightning"
says out "2405.17381"
if [ "$(awk '{ if (length($0) > 80) n++ } END { print n + 0 }' out)" != 0 ]; then
  fail "attn list is wider than 80 columns"
fi
run 0 "$attn" list --json --hidden 512 --heads 4 --dim 128
key softmax 0 name
key 2405.17381 1 arxiv
has 1 title
has 1 abilities 0
key 128 1 state_bytes shape dim
# Lightning keeps a float32 matrix of dim x dim a head; softmax a key and a value a token and head.
key $((4 * 128 * 128 * 4)) 1 state_bytes fixed
key 0 1 state_bytes per_token
key $((2 * 4 * 128 * 2)) 0 state_bytes per_token
run 0 "$attn" list --json --hidden 8 --heads 1 --dim 256 # more than gla can have
key null 2 state_bytes fixed
run 0 "$attn" list --hidden 8 --heads 1 --dim 256
run 1 "$attn" list --systems-md no/such/directory/file
says err "no/such/directory"

# A full disk.
if [ -w /dev/full ]; then
  "$attn" list >/dev/full 2>err
  [ $? = 1 ] || fail "writing to a full disk is not noticed"
  says err "cannot write to standard output"
fi

# Generated files: `make docs` renews them.
run 0 "$attn" list --systems-md systems.md
cmp systems.md "$source_directory/docs/systems.md" || fail "docs/systems.md is not up to date: make docs"
run 0 "$attn" help --roff
cmp out "$source_directory/man/attn.1" || fail "man/attn.1 is not up to date: make docs"

finish
