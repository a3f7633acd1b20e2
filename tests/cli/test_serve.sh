# attn serve: endpoints, clients at once, refusals, keys, stopping (serve.py).
. "$(dirname "$0")/support.sh"

"$make_model" model "$tiny_config" || exit 1
"$make_model" wide '{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1}' || exit 1
python3 "$source_directory/tests/cli/serve.py" "$attn" model wide \
  "$source_directory/tests/models/fixtures/families/llama/model.q8_0.gguf" || fail "serve.py"

finish
