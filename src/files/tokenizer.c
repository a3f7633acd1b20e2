#include "files/tokenizer.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/tokenizer/parts.h"

#include <stdio.h>
#include <string.h>

/* Positions in a piece are 32-bit, and GPT-2's alphabet takes two bytes for some. */
enum { LONGEST_TEXT = 1 << 29 };

void attn_tokens_free(attn_tokens *tokens) {
  attn_free(tokens->ids);
  *tokens = (attn_tokens){0};
}

/* -- Making -- */

static void free_decoder(attn_tokenizer *tokenizer) {
  attn_free(tokenizer->decoder.wordpiece_prefix);
  for (int i = 0; i < tokenizer->decoder.replacement_count; ++i) {
    attn_free(tokenizer->decoder.replacements[i].from);
    attn_free(tokenizer->decoder.replacements[i].to);
  }
  attn_text_free(&tokenizer->decoded);
  attn_free(tokenizer->decoded_at);
}

void attn_tokenizer_destroy(attn_tokenizer *tokenizer) {
  if (!tokenizer) return;
  attn_vocabulary_free(&tokenizer->vocabulary);
  attn_free(tokenizer->added);
  attn_prefixes_free(&tokenizer->raw);
  attn_prefixes_free(&tokenizer->normal);
  for (int i = 0; i < tokenizer->normaliser_count; ++i) attn_step_free(&tokenizer->normalisers[i]);
  for (int i = 0; i < tokenizer->split_count; ++i) attn_step_free(&tokenizer->splits[i]);
  attn_token_model *model = &tokenizer->model;
  attn_free(model->continuing_prefix);
  attn_free(model->word_suffix);
  attn_merges_free(&model->merges);
  attn_free(model->ranks);
  attn_prefixes_free(&model->prefixes);
  attn_free(model->scores);
  attn_tokens_free(&tokenizer->prefix);
  attn_tokens_free(&tokenizer->suffix);
  free_decoder(tokenizer);
  attn_free(tokenizer->special);
  attn_free(tokenizer);
}

static attn_tokenizer *make_empty(void) {
  attn_tokenizer *tokenizer = attn_alloc_zero(sizeof *tokenizer);
  if (tokenizer) tokenizer->model.unknown = -1;
  return tokenizer;
}

static attn_status hand_over(attn_tokenizer *made, attn_status status, attn_tokenizer **tokenizer) {
  if (status == ATTN_OK) status = attn_tokenizer_finish(made);
  if (status == ATTN_OK)
    *tokenizer = made;
  else
    attn_tokenizer_destroy(made);
  return status;
}

attn_status attn_tokenizer_load(const char *path, attn_tokenizer **tokenizer) {
  *tokenizer = NULL;
  attn_tokenizer *made = make_empty();
  if (!made) return ATTN_OUT_OF_MEMORY;
  return hand_over(made, attn_tokenizer_read_json(made, path), tokenizer);
}

attn_status attn_tokenizer_create(const attn_tokenizer_spec *spec, attn_tokenizer **tokenizer) {
  *tokenizer = NULL;
  attn_tokenizer *made = make_empty();
  if (!made) return ATTN_OUT_OF_MEMORY;
  return hand_over(made, attn_tokenizer_read_spec(made, spec), tokenizer);
}

attn_status attn_tokenizer_add_token(attn_tokenizer *tokenizer, attn_added added) {
  size_t size;
  const char *string = attn_vocabulary_string(&tokenizer->vocabulary, added.id, &size);
  if (size > ATTN_LONGEST_ADDED)
    return attn_fail(ATTN_BAD_FORMAT, "added token \"%.40s\" has %zu bytes, the most are %d",
                     string, size, ATTN_LONGEST_ADDED);
  ATTN_TRY(attn_reserve((void **)&tokenizer->added, &tokenizer->added_capacity,
                        tokenizer->added_count + 1, sizeof *tokenizer->added));
  tokenizer->added[tokenizer->added_count++] = added;
  return ATTN_OK;
}

attn_status attn_tokenizer_add_merge(attn_tokenizer *tokenizer, const char *merge, size_t size,
                                     int64_t index) {
  /* From the second byte: a space may itself be a token, and then it is the left one. */
  const char *space = size > 1 ? memchr(merge + 1, ' ', size - 1) : NULL;
  if (!space)
    return attn_fail(ATTN_BAD_FORMAT, "merge %lld, \"%.40s\", is not two tokens and a space",
                     (long long)index, merge);
  size_t left = (size_t)(space - merge);
  return attn_tokenizer_add_pair(tokenizer, merge, left, space + 1, size - left - 1, index);
}

attn_status attn_tokenizer_add_pair(attn_tokenizer *tokenizer, const char *left, size_t left_size,
                                    const char *right, size_t right_size, int64_t index) {
  const attn_vocabulary *vocabulary = &tokenizer->vocabulary;
  size_t skipped = tokenizer->model.continuing_size;
  attn_merge merge = {.left = attn_vocabulary_find(vocabulary, left, left_size),
                      .right = attn_vocabulary_find(vocabulary, right, right_size),
                      .result = -1,
                      .rank = (uint32_t)index};
  attn_text both = {0};
  if (skipped > right_size) skipped = right_size;
  attn_text_add(&both, left, left_size);
  attn_text_add(&both, right + skipped, right_size - skipped);
  if (!both.failed) merge.result = attn_vocabulary_find(vocabulary, both.data, both.length);
  bool failed = both.failed;
  attn_text_free(&both);
  if (failed) return ATTN_OUT_OF_MEMORY;
  if (merge.left < 0 || merge.right < 0 || merge.result < 0)
    return attn_fail(ATTN_BAD_FORMAT, "merge %lld: %s of \"%.40s\" and \"%.40s\" is no token",
                     (long long)index,
                     merge.left < 0    ? "the left"
                     : merge.right < 0 ? "the right"
                                       : "the union",
                     left, right);
  return attn_merges_add(&tokenizer->model.merges, merge);
}

/* Applies steps to all pieces; *in has the result, *out is for scrap. */
static attn_status apply_steps(const attn_step *steps, int count, attn_matcher *matcher,
                               attn_pieces **in, attn_pieces **out) {
  for (int i = 0; i < count; ++i) {
    attn_pieces_clear(*out);
    for (size_t p = 0; p < (*in)->count; ++p)
      ATTN_TRY(attn_step_apply(&steps[i], matcher, *in, p, *out));
    attn_pieces *swap = *in;
    *in = *out;
    *out = swap;
  }
  return ATTN_OK;
}

/* Added tokens that are found in normalised text are looked for as normalising leaves them. */
static attn_status add_normalised(attn_tokenizer *tokenizer, const char *string, size_t size,
                                  int32_t index) {
  attn_pieces pieces[2], *in = &pieces[0], *out = &pieces[1];
  attn_matcher matcher = {0};
  memset(pieces, 0, sizeof pieces);
  attn_text_add(&in->text, string, size);
  attn_status status = in->text.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
  if (status == ATTN_OK) status = attn_pieces_add(in, (attn_piece){0, size, ATTN_PIECE_TEXT, true});
  if (status == ATTN_OK) status = attn_matcher_create(&matcher, size);
  if (status == ATTN_OK)
    status = apply_steps(tokenizer->normalisers, tokenizer->normaliser_count, &matcher, &in, &out);
  if (status == ATTN_OK) {
    tokenizer->added[index].normal_at = tokenizer->normal.text.length;
    tokenizer->added[index].normal_size = in->items[0].end;
    status = attn_prefixes_add(&tokenizer->normal, in->text.data, in->items[0].end, index);
  }
  attn_matcher_free(&matcher);
  attn_pieces_free(&pieces[0]);
  attn_pieces_free(&pieces[1]);
  return status;
}

static attn_status finish_added(attn_tokenizer *tokenizer) {
  tokenizer->special = attn_alloc_zero(tokenizer->vocabulary.count);
  if (!tokenizer->special) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < tokenizer->added_count; ++i) {
    const attn_added *added = &tokenizer->added[i];
    size_t size = 0;
    const char *string = attn_vocabulary_string(&tokenizer->vocabulary, added->id, &size);
    if (added->special) tokenizer->special[added->id] = 1;
    if (added->normalized)
      ATTN_TRY(add_normalised(tokenizer, string, size, (int32_t)i));
    else
      ATTN_TRY(attn_prefixes_add(&tokenizer->raw, string, size, (int32_t)i));
  }
  attn_prefixes_sort(&tokenizer->raw);
  attn_prefixes_sort(&tokenizer->normal);
  return ATTN_OK;
}

/* -- What each token decodes to -- */

/* "<0x0A>" */
static int byte_of(const char *string, size_t size) {
  static const char digits[] = "0123456789ABCDEF";
  if (size != 6 || memcmp(string, "<0x", 3) != 0 || string[5] != '>') return -1;
  const char *high = memchr(digits, string[3], 16), *low = memchr(digits, string[4], 16);
  return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

static bool decode_alphabet(const char *string, size_t size, attn_text *out) {
  size_t length = out->length;
  int32_t code;
  for (size_t at = 0, bytes; at < size; at += bytes) {
    bytes = (size_t)attn_utf8_next(string + at, size - at, &code);
    int byte = bytes ? attn_character_byte(code) : -1;
    if (byte < 0) {
      out->length = length;
      return false;
    }
    char c = (char)byte;
    attn_text_add(out, &c, 1);
  }
  return true;
}

/* Replaces in out's text from `begin` on. */
static void replace_all(attn_text *out, size_t begin, const char *from, size_t from_size,
                        const char *to, size_t to_size) {
  attn_text changed = {0};
  const char *at = out->data + begin, *end = out->data + out->length, *place;
  if (out->failed || begin == out->length || !memmem(at, (size_t)(end - at), from, from_size))
    return;
  while ((place = memmem(at, (size_t)(end - at), from, from_size))) {
    attn_text_add(&changed, at, (size_t)(place - at));
    attn_text_add(&changed, to, to_size);
    at = place + from_size;
  }
  attn_text_add(&changed, at, (size_t)(end - at));
  out->length = begin;
  if (changed.failed)
    out->failed = true;
  else
    attn_text_add(out, changed.data, changed.length);
  attn_text_free(&changed);
}

static void clean_up(attn_text *out, size_t begin) {
  static const char *const changes[][2] = {
      {" .", "."},   {" ?", "?"},     {" !", "!"},     {" ,", ","},
      {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},   {" do not", " don't"},
      {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"},
  };
  for (size_t i = 0; i < sizeof changes / sizeof *changes; ++i)
    replace_all(out, begin, changes[i][0], strlen(changes[i][0]), changes[i][1],
                strlen(changes[i][1]));
}

static void decode_token(const attn_tokenizer *tokenizer, const char *string, size_t size,
                         bool added, attn_text *out) {
  const struct attn_token_decoder *decoder = &tokenizer->decoder;
  size_t begin = out->length, prefix = decoder->wordpiece_prefix_size;
  int byte = decoder->byte_fallback ? byte_of(string, size) : -1;
  if (byte >= 0) {
    char c = (char)byte;
    attn_text_add(out, &c, 1);
    return;
  }
  if (decoder->byte_level && !added && decode_alphabet(string, size, out)) return;
  bool continues = decoder->wordpiece && size >= prefix &&
                   memcmp(string, decoder->wordpiece_prefix, prefix) == 0;
  if ((decoder->wordpiece && !continues) || decoder->spaces) attn_text_add(out, " ", 1);
  if (continues)
    attn_text_add(out, string + prefix, size - prefix);
  else
    attn_text_add(out, string, size);
  for (int i = 0; i < decoder->replacement_count; ++i) {
    const struct attn_replacement *change = &decoder->replacements[i];
    replace_all(out, begin, change->from, change->from_size, change->to, change->to_size);
  }
  if (decoder->cleanup) clean_up(out, begin);
}

static void decode_added(const attn_tokenizer *tokenizer, const attn_added *added, attn_text *out) {
  size_t size;
  const char *string = attn_vocabulary_string(&tokenizer->vocabulary, added->id, &size);
  if (added->normalized) {
    string = tokenizer->normal.text.data + added->normal_at;
    size = added->normal_size;
  }
  if (size) decode_token(tokenizer, string, size, true, out);
}

/* Added tokens decode to the string that was found in the text. */
static void decode_all(attn_tokenizer *tokenizer, const int32_t *added) {
  for (size_t id = 0; id < tokenizer->vocabulary.count; ++id) {
    size_t size;
    const char *string = attn_vocabulary_string(&tokenizer->vocabulary, (int64_t)id, &size);
    if (added[id])
      decode_added(tokenizer, &tokenizer->added[added[id] - 1], &tokenizer->decoded);
    else if (string)
      decode_token(tokenizer, string, size, false, &tokenizer->decoded);
    tokenizer->decoded_at[id + 1] = tokenizer->decoded.length;
  }
}

static attn_status finish_decoding(attn_tokenizer *tokenizer) {
  size_t count = tokenizer->vocabulary.count;
  int32_t *added = attn_alloc_array(count, sizeof *added); /* 1 + the index, 0: none */
  tokenizer->decoded_at = attn_alloc_array(count + 1, sizeof *tokenizer->decoded_at);
  if (added && tokenizer->decoded_at) {
    for (size_t i = 0; i < tokenizer->added_count; ++i)
      added[tokenizer->added[i].id] = (int32_t)i + 1;
    decode_all(tokenizer, added);
  }
  bool failed = !added || !tokenizer->decoded_at || tokenizer->decoded.failed;
  attn_free(added);
  return failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

attn_status attn_tokenizer_finish(attn_tokenizer *tokenizer) {
  for (int byte = 0; byte < 256; ++byte) {
    char string[8];
    snprintf(string, sizeof string, "<0x%02X>", (unsigned)byte);
    tokenizer->model.byte_ids[byte] =
        attn_vocabulary_find_inside(&tokenizer->vocabulary, string, 6);
  }
  for (int i = 0; i < tokenizer->normaliser_count; ++i)
    tokenizer->bytes |= tokenizer->normalisers[i].kind == ATTN_STEP_BYTES;
  for (int i = 0; i < tokenizer->split_count; ++i)
    tokenizer->bytes |= tokenizer->splits[i].kind == ATTN_STEP_BYTES;
  ATTN_TRY(finish_added(tokenizer));
  return finish_decoding(tokenizer);
}

/* -- Encoding -- */

/* The text as pieces of UTF-8 and, where bytes can be tokens, pieces of bytes that are not. */
static attn_status take_text(const attn_tokenizer *tokenizer, const char *text, size_t size,
                             attn_pieces *out) {
  int32_t code;
  size_t begin = 0; /* of the run in out's text */
  for (size_t at = 0; at < size;) {
    size_t valid = at, invalid;
    for (int bytes; valid < size; valid += (size_t)bytes)
      if (!(bytes = attn_utf8_next(text + valid, size - valid, &code))) break;
    attn_text_add(&out->text, text + at, valid - at);
    for (invalid = valid; invalid < size && !attn_utf8_next(text + invalid, size - invalid, &code);)
      invalid += (size_t)attn_utf8_invalid(text + invalid, size - invalid);
    at = invalid;
    if (!tokenizer->bytes) {
      for (size_t i = valid; i < invalid; i += (size_t)attn_utf8_invalid(text + i, size - i))
        attn_utf8_add(&out->text, 0xfffd);
      continue;
    }
    size_t end = out->text.length;
    if (end > begin)
      ATTN_TRY(attn_pieces_add(out, (attn_piece){begin, end, ATTN_PIECE_TEXT, begin == 0}));
    attn_text_add(&out->text, text + valid, invalid - valid);
    begin = out->text.length;
    if (begin > end)
      ATTN_TRY(attn_pieces_add(out, (attn_piece){end, begin, ATTN_PIECE_BYTES, end == 0}));
  }
  if (out->text.failed) return ATTN_OUT_OF_MEMORY;
  if (tokenizer->bytes || out->text.length == 0) return ATTN_OK;
  return attn_pieces_add(out, (attn_piece){0, out->text.length, ATTN_PIECE_TEXT, true});
}

/* The character that ends at text[at - 1]; where it begins. */
static size_t character_before(const char *text, size_t at, int32_t *code) {
  size_t begin = at - 1;
  while (begin > 0 && ((unsigned char)text[begin] & 0xc0) == 0x80) --begin;
  attn_utf8_next(text + begin, at - begin, code);
  return begin;
}

static bool touches_word(const char *text, size_t size, size_t begin, size_t end) {
  int32_t code = 0;
  if (begin > 0) {
    character_before(text, begin, &code);
    if (attn_is_word(code)) return true;
  }
  return end < size && attn_utf8_next(text + end, size - end, &code) && attn_is_word(code);
}

/* The whitespace around an added token that belongs to it. */
static void widen(const attn_added *added, const char *text, size_t size, size_t taken,
                  size_t *begin, size_t *end) {
  int32_t code;
  while (added->left_strip && *begin > taken) {
    size_t before = character_before(text, *begin, &code);
    if (!attn_is_whitespace(code)) break;
    *begin = before;
  }
  while (added->right_strip && *end < size) {
    int bytes = attn_utf8_next(text + *end, size - *end, &code);
    if (!bytes || !attn_is_whitespace(code)) break;
    *end += (size_t)bytes;
  }
}

/* The longest string of the set that text[at..) begins with: its index, or -1. */
static int32_t longest_at(const attn_prefixes *set, const char *text, size_t size, size_t at,
                          size_t *end) {
  attn_prefix_walk walk = {0};
  int32_t best = -1, index;
  for (size_t i = at; i < size; ++i) {
    if (!attn_prefixes_step(set, &walk, (unsigned char)text[i], &index)) break;
    if (index < 0) continue;
    best = index;
    *end = i + 1;
  }
  return best;
}

static attn_status add_span(attn_pieces *out, const char *text, size_t begin, size_t end,
                            attn_piece piece) {
  if (begin >= end) return ATTN_OK;
  piece.first &= begin == 0;
  piece.begin = out->text.length;
  attn_text_add(&out->text, text + begin, end - begin);
  piece.end = out->text.length;
  return out->text.failed ? ATTN_OUT_OF_MEMORY : attn_pieces_add(out, piece);
}

/* Cuts added tokens out of a piece. */
static attn_status find_added(const attn_tokenizer *tokenizer, const attn_prefixes *set,
                              unsigned flags, const attn_pieces *in, size_t index,
                              attn_pieces *out) {
  attn_piece piece = in->items[index];
  const char *text = in->text.data + piece.begin;
  size_t size = piece.end - piece.begin, taken = 0, end = 0;
  for (size_t at = 0; at < size && piece.token == ATTN_PIECE_TEXT;) {
    int32_t found = longest_at(set, text, size, at, &end);
    if (found < 0) {
      ++at;
      continue;
    }
    const attn_added *added = &tokenizer->added[found];
    size_t begin = at;
    at = end;
    if (added->special && !(flags & ATTN_ENCODE_SPECIAL)) continue;
    if (added->single_word && touches_word(text, size, begin, end)) continue;
    widen(added, text, size, taken, &begin, &end);
    ATTN_TRY(add_span(out, text, taken, begin, piece));
    ATTN_TRY(attn_pieces_add(out, (attn_piece){.token = added->id}));
    taken = end;
    if (at < end) at = end;
  }
  if (piece.token >= 0) return attn_pieces_add(out, piece);
  return add_span(out, text, taken, size, piece);
}

static attn_status find_all_added(const attn_tokenizer *tokenizer, const attn_prefixes *set,
                                  unsigned flags, attn_pieces **in, attn_pieces **out) {
  if (!set->count) return ATTN_OK;
  attn_pieces_clear(*out);
  for (size_t i = 0; i < (*in)->count; ++i)
    ATTN_TRY(find_added(tokenizer, set, flags, *in, i, *out));
  attn_pieces *swap = *in;
  *in = *out;
  *out = swap;
  return ATTN_OK;
}

static attn_status encode_pieces(const attn_tokenizer *tokenizer, const attn_pieces *pieces,
                                 attn_scratch *scratch, attn_tokens *tokens) {
  static attn_status (*const encoders[])(const attn_token_model *, const attn_vocabulary *,
                                         attn_scratch *, const char *, size_t, attn_tokens *) = {
      [ATTN_BPE] = attn_bpe_encode,
      [ATTN_BPE_SCORES] = attn_bpe_encode,
      [ATTN_WORDPIECE] = attn_wordpiece_encode,
      [ATTN_UNIGRAM] = attn_unigram_encode,
  };
  for (size_t i = 0; i < pieces->count; ++i) {
    const attn_piece *piece = &pieces->items[i];
    if (piece->token >= 0)
      ATTN_TRY(attn_tokens_add(tokens, piece->token));
    else if (piece->end > piece->begin)
      ATTN_TRY(encoders[tokenizer->model.kind](&tokenizer->model, &tokenizer->vocabulary, scratch,
                                               pieces->text.data + piece->begin,
                                               piece->end - piece->begin, tokens));
  }
  return ATTN_OK;
}

/* What the stages use, freed by the caller whatever happens. */
typedef struct workspace {
  attn_pieces pieces[2];
  attn_matcher matcher;
  attn_scratch scratch;
} workspace;

static attn_status encode_text(const attn_tokenizer *tokenizer, const char *text, size_t size,
                               unsigned flags, workspace *work, attn_tokens *tokens) {
  attn_pieces *in = &work->pieces[0], *out = &work->pieces[1];
  attn_text_add(&in->text, "", 0); /* so that there is a place to point to */
  attn_text_add(&out->text, "", 0);
  ATTN_TRY(attn_matcher_create(&work->matcher, size));
  ATTN_TRY(take_text(tokenizer, text, size, in));
  ATTN_TRY(find_all_added(tokenizer, &tokenizer->raw, flags, &in, &out));
  ATTN_TRY(
      apply_steps(tokenizer->normalisers, tokenizer->normaliser_count, &work->matcher, &in, &out));
  ATTN_TRY(find_all_added(tokenizer, &tokenizer->normal, flags, &in, &out));
  ATTN_TRY(apply_steps(tokenizer->splits, tokenizer->split_count, &work->matcher, &in, &out));
  return encode_pieces(tokenizer, in, &work->scratch, tokens);
}

static attn_status add_all(attn_tokens *tokens, const attn_tokens *more) {
  for (size_t i = 0; i < more->count; ++i) ATTN_TRY(attn_tokens_add(tokens, more->ids[i]));
  return ATTN_OK;
}

attn_status attn_tokenizer_encode(const attn_tokenizer *tokenizer, const char *text, size_t size,
                                  unsigned flags, attn_tokens *tokens) {
  if (size > LONGEST_TEXT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "the text has %zu bytes; at most %d at a time", size,
                     LONGEST_TEXT);
  workspace work;
  memset(&work, 0, sizeof work);
  size_t count = tokens->count;
  bool ends = flags & ATTN_ENCODE_ENDS;
  attn_status status = ends ? add_all(tokens, &tokenizer->prefix) : ATTN_OK;
  if (status == ATTN_OK) status = encode_text(tokenizer, text, size, flags, &work, tokens);
  if (status == ATTN_OK && ends) status = add_all(tokens, &tokenizer->suffix);
  if (status != ATTN_OK) tokens->count = count;
  attn_pieces_free(&work.pieces[0]);
  attn_pieces_free(&work.pieces[1]);
  attn_matcher_free(&work.matcher);
  attn_scratch_free(&work.scratch);
  return status;
}

/* -- Decoding and asking -- */

static void drop_spaces(attn_text *text, size_t begin, size_t most) {
  size_t spaces = 0;
  while (spaces < most && begin + spaces < text->length && text->data[begin + spaces] == ' ')
    ++spaces;
  if (!spaces) return;
  memmove(text->data + begin, text->data + begin + spaces, text->length - begin - spaces);
  text->length -= spaces;
  text->data[text->length] = '\0';
}

attn_status attn_tokenizer_decode(const attn_tokenizer *tokenizer, const int32_t *ids, size_t count,
                                  unsigned flags, attn_text *text) {
  size_t begin = text->length;
  for (size_t i = 0; i < count; ++i) {
    int32_t id = ids[i];
    if (!attn_vocabulary_string(&tokenizer->vocabulary, id, NULL)) {
      text->length = begin;
      return attn_fail(ATTN_INVALID_ARGUMENT, "id %d (at %zu) is no token: there are %zu", id, i,
                       tokenizer->vocabulary.count);
    }
    if (tokenizer->special[id] && flags & ATTN_DECODE_SKIP_SPECIAL) continue;
    size_t at = tokenizer->decoded_at[id], size = tokenizer->decoded_at[id + 1] - at;
    if (size) attn_text_add(text, tokenizer->decoded.data + at, size);
  }
  if (text->failed) return ATTN_OUT_OF_MEMORY;
  if (flags & ATTN_DECODE_START) drop_spaces(text, begin, tokenizer->decoder.strip);
  return ATTN_OK;
}

size_t attn_tokenizer_suffix(const attn_tokenizer *tokenizer) {
  return tokenizer->suffix.count;
}

int64_t attn_tokenizer_count(const attn_tokenizer *tokenizer) {
  return (int64_t)tokenizer->vocabulary.count;
}

const char *attn_tokenizer_string(const attn_tokenizer *tokenizer, int64_t id, size_t *size) {
  return attn_vocabulary_string(&tokenizer->vocabulary, id, size);
}

int32_t attn_tokenizer_find(const attn_tokenizer *tokenizer, const char *string, size_t size) {
  return attn_vocabulary_find(&tokenizer->vocabulary, string, size);
}

bool attn_tokenizer_is_special(const attn_tokenizer *tokenizer, int64_t id) {
  return id >= 0 && id < (int64_t)tokenizer->vocabulary.count && tokenizer->special[id];
}
