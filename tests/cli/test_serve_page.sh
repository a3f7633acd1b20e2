# The page of attn serve in Chromium (page.py); skipped where there is none.
. "$(dirname "$0")/support.sh"

chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
  echo "skipped: no Chromium here (scripts/dependencies browser installs it)"
  exit 77
}
export HOME="$work" # where a browser leaves things
"$make_model" model "$tiny_config" || exit 1
python3 "$source_directory/tests/cli/page.py" "$chromium" "$attn" model \
  "$source_directory/tests/models/fixtures/families/llama/model.q8_0.gguf" || fail "page.py"

finish
