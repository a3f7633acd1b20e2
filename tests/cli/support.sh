# What the tests of the command share. Each begins with:  . "$(dirname "$0")/support.sh"
#
#   test_x.sh BUILD_DIRECTORY SOURCE_DIRECTORY
set -u
build=$(cd "$1" && pwd)
source_directory=$(cd "$2" && pwd)
attn="$build/attn"
make_model="$build/cli_make_model"
json="$build/cli_json"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

# One thread: the tests are small, and run beside others on a busy machine.
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$work/cache" ATTN_MODELS="$work/no-models"

failures=0

fail() {
  failures=$((failures + 1))
  echo "FAIL: $*" >&2
  for file in out err; do
    [ -s "$file" ] && { echo "--- std$file:"; head -c 2000 "$file"; echo; } >&2
  done
  return 0
}

# run CODE COMMAND...: runs with no input, keeps out and err, and expects the exit code.
run() {
  expected=$1
  shift
  "$@" >out 2>err </dev/null
  code=$?
  [ "$code" = "$expected" ] || fail "exit code $code, expected $expected: $*"
  # A crash, or what a sanitiser prints, is never right.
  if grep -q -e 'ERROR: AddressSanitizer' -e 'runtime error:' -e 'LeakSanitizer' err; then
    fail "sanitiser: $*"
  fi
}

# says FILE TEXT: FILE (out or err) contains the text.
says() {
  grep -q -F -e "$2" "$1" || fail "std$1 does not say '$2'"
}

# key EXPECTED KEYS...: the JSON in `out` has this value there.
key() {
  wanted=$1
  shift
  got=$("$json" "$@" <out) || fail "no JSON or no key $*"
  [ "$got" = "$wanted" ] || fail "$* is '$got', expected '$wanted'"
}

# has KEYS...: the JSON in `out` has these keys.
has() {
  "$json" "$@" <out >value || fail "no JSON or no key $*"
}

finish() {
  [ "$failures" = 0 ] || { echo "$failures failures" >&2; exit 1; }
  exit 0
}

tiny_config='{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
  "mixers": ["lightning", "softmax"]}'
