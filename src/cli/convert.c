/* attn convert: a model in another kind of file, or with weights of another type. */
#include "base/io.h"
#include "base/memory.h"
#include "base/progress.h"
#include "cli/convert.h"
#include "files/gguf_split.h"
#include "models/model.h"

#include <string.h>

/* In the order of attn_weight_type. */
static const char *const type_names[] = {"stored", "f32", "f16", "bf16", "q8_0", "q4_0", NULL};

/* That of the file, and float16 where it is quantised, bfloat16 where it is float8. */
static attn_dtype stored_dtype(const attn_model *model) {
  attn_stored stored;
  if (!attn_model_find_stored(model, 0, &stored)) return ATTN_F32;
  if (stored.in_blocks) return ATTN_F16;
  return attn_dtype_size(stored.dtype) == 1 ? ATTN_BF16 : stored.dtype;
}

static attn_status save_directory(const convert_options *o, const attn_model *model,
                                  const char *path) {
  static const attn_dtype dtypes[] = {[ATTN_WEIGHTS_F32] = ATTN_F32,
                                      [ATTN_WEIGHTS_F16] = ATTN_F16,
                                      [ATTN_WEIGHTS_BF16] = ATTN_BF16};
  attn_dtype dtype = o->type == ATTN_WEIGHTS_AS_STORED ? stored_dtype(model) : dtypes[o->type];
  attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
  options.dtype = dtype;
  if (o->split >= 0) options.shard_bytes = o->split;
  return attn_model_save_as(model, path, &options);
}

/* What was written, for people. */
typedef struct summary {
  int64_t tensors[ATTN_BLOCK_TYPES], bytes, files;
  int64_t odd; /* float16 matrices because their rows are not whole blocks */
} summary;

static void count_tensor(const attn_gguf_tensor *t, bool blocks_wanted, summary *s) {
  ++s->tensors[t->type];
  s->bytes += (int64_t)t->bytes;
  s->odd += blocks_wanted && t->type == ATTN_BLOCK_F16;
}

static attn_status summarise(const convert_options *o, const char *path, summary *s) {
  attn_gguf *file;
  ATTN_TRY(attn_gguf_open(path, &file));
  bool blocks = o->type == ATTN_WEIGHTS_Q8_0 || o->type == ATTN_WEIGHTS_Q4_0;
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i)
    count_tensor(attn_gguf_tensor_at(file, i), blocks, s);
  attn_gguf_close(file);
  return ATTN_OK;
}

static void print_summary(const char *path, const summary *s) {
  char bytes[ATTN_FORMAT_SIZE];
  printf("%s: %s in %lld file%s;", path, attn_format_bytes((double)s->bytes, bytes, sizeof bytes),
         (long long)s->files, s->files == 1 ? "" : "s");
  const char *separator = " ";
  for (int type = 0; type < ATTN_BLOCK_TYPES; ++type) {
    if (!s->tensors[type]) continue;
    printf("%s%lld tensors %s", separator, (long long)s->tensors[type],
           attn_block_get_format((attn_block_type)type)->name);
    separator = ", ";
  }
  printf("\n");
  if (s->odd)
    printf("%lld matri%s F16: rows that are not whole blocks of 32\n", (long long)s->odd,
           s->odd == 1 ? "x is" : "ces are");
}

static attn_status save_gguf(const convert_options *o, const attn_model *model, const char *path) {
  attn_gguf_options options = ATTN_GGUF_OPTIONS_INIT;
  summary s = {0};
  int files;
  options.type = (attn_weight_type)o->type;
  options.shard_bytes = o->split > 0 ? o->split : 0;
  ATTN_TRY(attn_model_write_gguf(model, path, &options, &files));
  char *written = files > 1 ? attn_gguf_shard_path(path, 0, files) : attn_strdup(path);
  if (!written) return ATTN_OUT_OF_MEMORY;
  s.files = files;
  attn_status status = summarise(o, written, &s);
  if (status == ATTN_OK) print_summary(written, &s);
  attn_free(written);
  return status;
}

static attn_status convert(const convert_options *o, const char *from, const char *to) {
  attn_model *model;
  ATTN_TRY(attn_set_threads((int)o->threads));
  char *path = attn_find_model(from);
  if (!path) return ATTN_NOT_FOUND;
  attn_status status = attn_model_read(path, ATTN_F32, &model);
  attn_free(path);
  ATTN_TRY(status);
  status =
      attn_path_has_suffix(to, ".gguf") ? save_gguf(o, model, to) : save_directory(o, model, to);
  attn_model_destroy(model);
  return status;
}

static const convert_options defaults = {.type = ATTN_WEIGHTS_AS_STORED,
                                         .split = -1,
                                         .linearise = ATTN_LINEARISE_OPTIONS_INIT,
                                         .device = ATTN_DEVICE_AUTO};

/* Whether options are given that belong to --to. */
static bool has_mixer_options(const convert_options *o) {
  return o->data.count || o->json || o->quiet || strcmp(o->device, defaults.device) != 0 ||
         o->window_kind != defaults.window_kind ||
         memcmp(&o->linearise, &defaults.linearise, sizeof o->linearise) != 0;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const convert_options *o = options;
  if (o->linearise.mixer && !o->data.count)
    return attn_misuse(command, "--to needs --data: the text to learn from");
  if (o->linearise.mixer && attn_path_has_suffix(words->items[1], ".gguf"))
    return attn_misuse(command, "--to writes a directory: GGUF has no names for other mixers");
  if (o->linearise.mixer && (o->type != defaults.type || o->split != defaults.split))
    return attn_misuse(command, "--type and --split do not go with --to: it has --save-dtype");
  if (o->linearise.mixer) return attn_convert_mixer(command, o, words);
  if (has_mixer_options(o))
    return attn_misuse(command, "only --type, --split and --threads go without --to");
  bool to_gguf = attn_path_has_suffix(words->items[1], ".gguf");
  if (!to_gguf && (o->type == ATTN_WEIGHTS_Q8_0 || o->type == ATTN_WEIGHTS_Q4_0))
    return attn_misuse(command, "--type %s needs a .gguf file: a directory has f32, f16 or bf16",
                       type_names[o->type]);
  attn_status status = convert(o, words->items[0], words->items[1]);
  return status == ATTN_OK ? ATTN_EXIT_OK : attn_report(command, status);
}

static const char *const window_kinds[] = {"terrace", "sliding", NULL};
static const char *const save_dtypes[] = {"bfloat16", "float32", "float16", NULL};

#define AT(field) ATTN_FIELD(convert_options, field)
#define OF(field) ATTN_FIELD(convert_options, linearise.field)
static const attn_option table[] = {
    {"type", 't', ATTN_OPTION_CHOICE, "TYPE",
     "Of the matrices; stored: as MODEL has them, of quantised ones f16 in a directory, of float8 "
     "bf16",
     AT(type), 0, 0, type_names},
    {"split", 0, ATTN_OPTION_INT, "BYTES",
     "Several files of at most BYTES of weights each (4G); 0: one. Without it one .gguf file, and "
     "as many as 5 GB each need in a directory.",
     AT(split), 0, 1LL << 50, NULL},
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"to", 0, ATTN_OPTION_TEXT, "MIXER",
     "Replace exact attention by this mixer (hedgehog, lawcat, lolcats) and let it learn what "
     "attention did.",
     OF(mixer), 0, 0, NULL},
    {"window", 'w', ATTN_OPTION_INT, "N", "Tokens of lolcats' window of exact attention; 0: 64.",
     OF(window), 0, 1 << 16, NULL},
    {"window-kind", 0, ATTN_OPTION_CHOICE, "KIND",
     "Of lolcats: terrace, a token's block of N tokens and the one before, or the last N tokens",
     AT(window_kind), 0, 0, window_kinds},
    {"affine", 0, ATTN_OPTION_FLAG, NULL,
     "Lolcats' linear part is weighed by 1 - gamma, as its window is by gamma.", OF(affine), 0, 0,
     NULL},
    {"feature-dim", 0, ATTN_OPTION_INT, "N",
     "Half the features of a head; 0: what the mixer has usually.", OF(feature_dim), 0, 128, NULL},
    {"data", 'd', ATTN_OPTION_WORDS, "PATH...", "To learn from: files, and directories of files.",
     AT(data), 0, 0, NULL},
    {"keep-every", 0, ATTN_OPTION_INT, "N", "Every N-th layer keeps its attention; 0: none does.",
     OF(keep_every), 0, 4096, NULL},
    {"steps", 'n', ATTN_OPTION_INT, "N", "Of attention transfer; 0: the new mixer learns nothing.",
     OF(steps), 0, 1 << 27, NULL},
    {"batch", 'b', ATTN_OPTION_INT, "N", "Windows of text in a step.", OF(batch), 1, 1 << 20, NULL},
    {"length", 'l', ATTN_OPTION_INT, "N", "Tokens of a window.", OF(length), 1, 1 << 30, NULL},
    {"learning-rate", 'r', ATTN_OPTION_REAL, "R", "At the start; it falls to a tenth.",
     OF(learning_rate), 0, 1e3, NULL},
    {"validation", 0, ATTN_OPTION_REAL, "F",
     "Fraction of the text, at its end, that perplexities are measured on.",
     OF(validation_fraction), 0, 0.999, NULL},
    {"validation-tokens", 0, ATTN_OPTION_INT, "N", "Of that, at most.", OF(validation_tokens), 0,
     1 << 30, NULL},
    {"seed", 's', ATTN_OPTION_SEED, "S", "Of fresh parameters and the order of the text.", OF(seed),
     0, 0, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", OF(compute), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    {"save-dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the converted model's weights", OF(save_dtype),
     0, 0, save_dtypes},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object about --to.", AT(json), 0, 0, NULL},
    {"quiet", 'q', ATTN_OPTION_FLAG, NULL, "No progress.", AT(quiet), 0, 0, NULL},
};

const attn_command attn_command_convert = {
    .name = "convert",
    .summary = "write a model as another kind of file, or with another mixer",
    .usage = "MODEL OUT",
    .description =
        "Writes MODEL, a directory or a .gguf file, as OUT: one .gguf file (or several, with "
        "--split), or a directory with config.json, model.safetensors (or shards and their index) "
        "and tokenizer.json. "
        "Tokenizer, "
        "chat template and generation_config.json go with it.\n\nVectors and norms stay float32 in "
        "GGUF files, and matrices whose rows are not whole blocks of 32 become f16 where q8_0 or "
        "q4_0 is asked for. Families that have no names in GGUF are refused.\n\nWith "
        "--to, a model with exact attention becomes one with another mixer: its weights are "
        "copied, keys and values get a head for each query head (but in lawcat and lolcats), and "
        "what only the new mixer has "
        "learns to give what attention gave, layer by layer (attention transfer, LoLCATs). The "
        "perplexity is printed before, after the swap and after the transfer. `attn train --model "
        "OUT` goes on from there.",
    .examples =
        "attn convert models/smollm2 smollm2.gguf --type q8_0\ta quantised file\n"
        "attn convert models/smollm2 runs/hedgehog --to hedgehog --data texts/\tlinear "
        "attention\n"
        "attn convert models/smollm2 runs/lolcats --to lolcats --window 32 --data texts/\texact "
        "attention over 33 to 64 tokens, linear over the rest\n"
        "attn convert model.gguf model --type bf16\ta directory for other tools\n"
        "attn convert big.gguf part.gguf --split 4G\tseveral files\n"
        "attn convert big.gguf big --split 2G\tmodel-00001-of-0000N.safetensors ...",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .least_words = 2,
    .most_words = 2,
    .run = run,
};
