# bench_operator: every operator beside its formula, and what it refuses (operator.py).
. "$(dirname "$0")/support.sh"

python3 "$source_directory/tests/cli/operator.py" "$build/bench_operator" || fail "operator.py"

finish
