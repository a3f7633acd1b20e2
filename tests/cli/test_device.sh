# --device: what is missing is said, and the processor goes on.
. "$(dirname "$0")/support.sh"

"$make_model" model "$tiny_config" || exit 1

run 0 "$attn" run model --device cpu --prompt "Hello" -n 20 --temperature 0
cp out cpu
run 1 "$attn" run model --device nowhere --prompt "Hello"
grep -q "cpu, cuda, cuda:N or auto" err || fail "an unknown device: $(cat err)"

ATTN_CUDA_MODULE=$PWD/none.so
export ATTN_CUDA_MODULE
for command in "run model --prompt x" "eval model --data cpu" "bench --lengths 16"; do
  run 1 "$attn" $command --device cuda
  grep -q "cuda: the module cannot be loaded" err || fail "$command without a module: $(cat err)"
done
run 0 "$attn" run model --prompt "Hello" -n 20 --temperature 0
cmp -s out cpu || fail "auto without a module writes something else"
