/* Graphemes (Unicode Standard Annex 29, extended ones) of Unicode 17, whatever version utf8proc is
 * of: it says where they begin, and here is what changed after Unicode 15.0. Left out are the
 * pictographs: they decide only what follows a pictograph and a joiner, and charsmaps look at
 * graphemes that short only after U+00A9 and U+00AE, which real ones leave alone. */
#include "files/tokenizer/parts.h"

#include <utf8proc.h>

/* A character with the Grapheme_Cluster_Break that others have had since a later version. */
enum { OTHER = 'a', CONTROL = 0x200b, EXTEND = 0x300, PREPEND = 0x600, SPACING_MARK = 0x903 };

typedef struct range {
  int32_t first, last;
  int32_t like; /* such a character */
} range;

static const range changed[] = {
    {0x897, 0x897, EXTEND},           {0xcc0, 0xcc0, EXTEND},
    {0xcc7, 0xcc8, EXTEND},           {0xcca, 0xccb, EXTEND},
    {0x1715, 0x1715, EXTEND},         {0x1734, 0x1734, EXTEND},
    {0x1acf, 0x1add, EXTEND},         {0x1ae0, 0x1aeb, EXTEND},
    {0x1b3b, 0x1b3b, EXTEND},         {0x1b3d, 0x1b3d, EXTEND},
    {0x1b43, 0x1b44, EXTEND},         {0x1baa, 0x1baa, EXTEND},
    {0x1bf2, 0x1bf3, EXTEND},         {0x2065, 0x2065, CONTROL},
    {0xa953, 0xa953, EXTEND},         {0xa9c0, 0xa9c0, EXTEND},
    {0xfff0, 0xfff8, CONTROL},        {0x10d69, 0x10d6d, EXTEND},
    {0x10efa, 0x10efc, EXTEND},       {0x111c0, 0x111c0, EXTEND},
    {0x11235, 0x11235, EXTEND},       {0x1134d, 0x1134d, EXTEND},
    {0x113b8, 0x113b8, EXTEND},       {0x113b9, 0x113ba, SPACING_MARK},
    {0x113bb, 0x113c0, EXTEND},       {0x113c2, 0x113c2, EXTEND},
    {0x113c5, 0x113c5, EXTEND},       {0x113c7, 0x113c9, EXTEND},
    {0x113ca, 0x113ca, SPACING_MARK}, {0x113cc, 0x113cd, SPACING_MARK},
    {0x113ce, 0x113d0, EXTEND},       {0x113d1, 0x113d1, PREPEND},
    {0x113d2, 0x113d2, EXTEND},       {0x113e1, 0x113e2, EXTEND},
    {0x116b6, 0x116b6, EXTEND},       {0x1171e, 0x1171e, SPACING_MARK},
    {0x1193d, 0x1193d, EXTEND},       {0x11a3a, 0x11a3a, OTHER},
    {0x11b60, 0x11b60, EXTEND},       {0x11b61, 0x11b61, SPACING_MARK},
    {0x11b62, 0x11b64, EXTEND},       {0x11b65, 0x11b65, SPACING_MARK},
    {0x11b66, 0x11b66, EXTEND},       {0x11b67, 0x11b67, SPACING_MARK},
    {0x11f41, 0x11f41, EXTEND},       {0x11f5a, 0x11f5a, EXTEND},
    {0x1611e, 0x16129, EXTEND},       {0x1612a, 0x1612c, SPACING_MARK},
    {0x1612d, 0x1612f, EXTEND},       {0x16ff0, 0x16ff1, EXTEND},
    {0x1d166, 0x1d166, EXTEND},       {0x1d16d, 0x1d16d, EXTEND},
    {0x1e5ee, 0x1e5ef, EXTEND},       {0x1e6e3, 0x1e6e3, EXTEND},
    {0x1e6e6, 0x1e6e6, EXTEND},       {0x1e6ee, 0x1e6ef, EXTEND},
    {0x1e6f5, 0x1e6f5, EXTEND},       {0xe0000, 0xe0000, CONTROL},
    {0xe0002, 0xe001f, CONTROL},      {0xe0080, 0xe00ff, CONTROL},
    {0xe01f0, 0xe0fff, CONTROL},
};

/* Indic_Conjunct_Break: linkers join the consonants on both sides, also with extenders between. */
static const range linkers[] = {
    {0x94d, 0x94d, 0},     {0x9cd, 0x9cd, 0},     {0xacd, 0xacd, 0},     {0xb4d, 0xb4d, 0},
    {0xc4d, 0xc4d, 0},     {0xd4d, 0xd4d, 0},     {0x1039, 0x1039, 0},   {0x17d2, 0x17d2, 0},
    {0x1a60, 0x1a60, 0},   {0x1b44, 0x1b44, 0},   {0x1bab, 0x1bab, 0},   {0xa9c0, 0xa9c0, 0},
    {0xaaf6, 0xaaf6, 0},   {0x10a3f, 0x10a3f, 0}, {0x11133, 0x11133, 0}, {0x113d0, 0x113d0, 0},
    {0x1193e, 0x1193e, 0}, {0x11a47, 0x11a47, 0}, {0x11a99, 0x11a99, 0}, {0x11f42, 0x11f42, 0},
};

static const range consonants[] = {
    {0x915, 0x939, 0},     {0x958, 0x95f, 0},     {0x978, 0x97f, 0},     {0x995, 0x9a8, 0},
    {0x9aa, 0x9b0, 0},     {0x9b2, 0x9b2, 0},     {0x9b6, 0x9b9, 0},     {0x9dc, 0x9dd, 0},
    {0x9df, 0x9df, 0},     {0x9f0, 0x9f1, 0},     {0xa95, 0xaa8, 0},     {0xaaa, 0xab0, 0},
    {0xab2, 0xab3, 0},     {0xab5, 0xab9, 0},     {0xaf9, 0xaf9, 0},     {0xb15, 0xb28, 0},
    {0xb2a, 0xb30, 0},     {0xb32, 0xb33, 0},     {0xb35, 0xb39, 0},     {0xb5c, 0xb5d, 0},
    {0xb5f, 0xb5f, 0},     {0xb71, 0xb71, 0},     {0xc15, 0xc28, 0},     {0xc2a, 0xc39, 0},
    {0xc58, 0xc5a, 0},     {0xd15, 0xd3a, 0},     {0x1000, 0x102a, 0},   {0x103f, 0x103f, 0},
    {0x1050, 0x1055, 0},   {0x105a, 0x105d, 0},   {0x1061, 0x1061, 0},   {0x1065, 0x1066, 0},
    {0x106e, 0x1070, 0},   {0x1075, 0x1081, 0},   {0x108e, 0x108e, 0},   {0x1780, 0x17b3, 0},
    {0x1a20, 0x1a54, 0},   {0x1b0b, 0x1b0c, 0},   {0x1b13, 0x1b33, 0},   {0x1b45, 0x1b4c, 0},
    {0x1b83, 0x1ba0, 0},   {0x1bae, 0x1baf, 0},   {0x1bbb, 0x1bbd, 0},   {0xa989, 0xa98b, 0},
    {0xa98f, 0xa9b2, 0},   {0xa9e0, 0xa9e4, 0},   {0xa9e7, 0xa9ef, 0},   {0xa9fa, 0xa9fe, 0},
    {0xaa60, 0xaa6f, 0},   {0xaa71, 0xaa73, 0},   {0xaa7a, 0xaa7a, 0},   {0xaa7e, 0xaa7f, 0},
    {0xaae0, 0xaaea, 0},   {0xabc0, 0xabda, 0},   {0x10a00, 0x10a00, 0}, {0x10a10, 0x10a13, 0},
    {0x10a15, 0x10a17, 0}, {0x10a19, 0x10a35, 0}, {0x11103, 0x11126, 0}, {0x11144, 0x11144, 0},
    {0x11147, 0x11147, 0}, {0x11380, 0x11389, 0}, {0x1138b, 0x1138b, 0}, {0x1138e, 0x1138e, 0},
    {0x11390, 0x113b5, 0}, {0x11900, 0x11906, 0}, {0x11909, 0x11909, 0}, {0x1190c, 0x11913, 0},
    {0x11915, 0x11916, 0}, {0x11918, 0x1192f, 0}, {0x11a00, 0x11a00, 0}, {0x11a0b, 0x11a32, 0},
    {0x11a50, 0x11a50, 0}, {0x11a5c, 0x11a83, 0}, {0x11f04, 0x11f10, 0}, {0x11f12, 0x11f33, 0},
};

#define COUNT(table) (sizeof(table) / sizeof *(table))

static const range *find(const range *ranges, size_t count, int32_t code) {
  size_t low = 0;
  for (size_t high = count; low < high;) {
    size_t middle = (low + high) / 2;
    if (ranges[middle].last < code)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && ranges[low].first <= code ? &ranges[low] : NULL;
}

enum { NONE = 0, CONSONANT, LINKED }; /* a consonant, and extenders; a linker among them */

/* Whether a linker joins the character to what stands before it; what stands before the next. */
static bool joins(attn_grapheme *grapheme, int32_t code, int32_t like) {
  enum { NON_JOINER = 0x200c };
  int class = utf8proc_get_property(like)->boundclass;
  bool extends = class == UTF8PROC_BOUNDCLASS_EXTEND || class == UTF8PROC_BOUNDCLASS_ZWJ;
  bool linked = grapheme->conjunct == LINKED, consonant = false;
  if (find(consonants, COUNT(consonants), code)) {
    consonant = true;
    grapheme->conjunct = CONSONANT;
  } else if (find(linkers, COUNT(linkers), code)) {
    if (grapheme->conjunct) grapheme->conjunct = LINKED;
  } else if (!extends || code == NON_JOINER) {
    grapheme->conjunct = NONE;
  }
  return consonant && linked;
}

bool attn_grapheme_begins(attn_grapheme *grapheme, int32_t code) {
  const range *change = find(changed, COUNT(changed), code);
  int32_t like = change ? change->like : code;
  bool joined = joins(grapheme, code, like);
  bool begins = !grapheme->started ||
                utf8proc_grapheme_break_stateful(grapheme->last, like, &grapheme->breaks);
  grapheme->started = true;
  grapheme->last = like;
  return begins && !joined;
}
