/* Long Range Arena's image task with digits in place of photographs: which digit an image of 32 x
 * 32 grey pixels shows, read row by row (arXiv 2011.04006, section 2.3). The digit is a few strokes
 * in the unit square, jittered, slanted, turned and scaled, anywhere in the image, with stray lines
 * and noise. Tokens: 1 .. 256 are pixels. The label, at the last pixel, is 1 + the digit. */
#include "base/status.h"
#include "tasks/drawing.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

enum { PIXELS = ATTN_DIGIT_SIZE * ATTN_DIGIT_SIZE, CLASSES = 10 };

/* A point, or an arc of `count` pieces from one angle to another in degrees around it; `last` ends
 * a stroke. */
typedef struct mark {
  float x, y, rx, ry, from, to;
  int count;
  bool last;
} mark;

#define POINT(x, y)                                                                                \
  { x, y, 0, 0, 0, 0, 0, false }
#define END(x, y)                                                                                  \
  { x, y, 0, 0, 0, 0, 0, true }
#define ARC(...)                                                                                   \
  { __VA_ARGS__, false }
#define ARC_END(...)                                                                               \
  { __VA_ARGS__, true }
enum { MOST_MARKS = 5 };
static const struct glyph {
  int marks;
  mark mark[MOST_MARKS];
} glyphs[CLASSES] = {
    {1, {ARC_END(.5F, .5F, .32F, .48F, 0, 360, 11)}},
    {3, {POINT(.3F, .2F), POINT(.55F, .02F), END(.55F, .98F)}},
    {3, {ARC(.5F, .27F, .3F, .25F, 180, 380, 6), POINT(.2F, .98F), END(.82F, .98F)}},
    {2,
     {ARC_END(.47F, .26F, .28F, .24F, 200, 450, 6), ARC_END(.47F, .74F, .32F, .24F, 270, 520, 6)}},
    {4, {POINT(.62F, .98F), POINT(.62F, .02F), POINT(.15F, .66F), END(.88F, .66F)}},
    {4,
     {POINT(.78F, .02F), POINT(.27F, .02F), POINT(.22F, .45F),
      ARC_END(.48F, .69F, .31F, .28F, 250, 500, 6)}},
    {3, {POINT(.7F, .03F), POINT(.3F, .4F), ARC_END(.5F, .7F, .29F, .28F, 190, 550, 8)}},
    {3, {POINT(.18F, .02F), POINT(.82F, .02F), END(.4F, .98F)}},
    {2, {ARC_END(.5F, .26F, .25F, .23F, 0, 360, 8), ARC_END(.5F, .74F, .31F, .24F, 0, 360, 8)}},
    {3, {POINT(.3F, .97F), POINT(.7F, .6F), ARC_END(.5F, .3F, .29F, .28F, 10, 370, 8)}},
};

/* How points of the unit square get to the image. */
typedef struct placement {
  float size, turn, shear, aspect, radius, ink;
  attn_point centre;
} placement;

static attn_point place(attn_recipe *r, const placement *to, float x, float y) {
  const float jitter = 0.025F;
  x += jitter * attn_recipe_normal(r) - 0.5F;
  y += jitter * attn_recipe_normal(r) - 0.5F;
  x = (x + to->shear * y) * to->aspect;
  float c = cosf(to->turn), s = sinf(to->turn);
  return (attn_point){to->centre.x + to->size * (c * x - s * y),
                      to->centre.y + to->size * (s * x + c * y)};
}

static void draw_glyph(attn_recipe *r, const attn_image *image, const struct glyph *glyph,
                       const placement *to) {
  const float degree = 0.01745329251994329577F;
  attn_point last = {0, 0};
  bool begun = false;
  for (int i = 0; i < glyph->marks; ++i) {
    const mark *m = &glyph->mark[i];
    for (int n = 0; n <= m->count; ++n) {
      float angle =
          m->count ? degree * (m->from + (m->to - m->from) * (float)n / (float)m->count) : 0;
      attn_point p = m->count ? place(r, to, m->x + m->rx * cosf(angle), m->y + m->ry * sinf(angle))
                              : place(r, to, m->x, m->y);
      if (begun) attn_draw_capsule(image, last, p, to->radius, to->ink);
      last = p;
      begun = true;
    }
    if (m->last) begun = false;
  }
}

int attn_draw_digit(attn_recipe *r, const attn_image *image) {
  const float last_pixel = ATTN_DIGIT_SIZE - 1, turn = 6.28318530717958647692F, noise = 0.1F;
  memset(image->pixels, 0, PIXELS * sizeof *image->pixels);
  int digit = attn_recipe_below(r, CLASSES);
  placement to = {.size = attn_recipe_between(r, 14, 24)};
  float margin = 15 - to.size / 2;
  to.centre.x = last_pixel / 2 + attn_recipe_between(r, -margin, margin);
  to.centre.y = last_pixel / 2 + attn_recipe_between(r, -margin, margin);
  to.turn = attn_recipe_between(r, -.35F, .35F);
  to.shear = attn_recipe_between(r, -.25F, .25F);
  to.aspect = attn_recipe_between(r, .8F, 1.2F);
  to.radius = attn_recipe_between(r, .8F, 1.8F);
  to.ink = attn_recipe_between(r, .6F, 1);
  draw_glyph(r, image, &glyphs[digit], &to);
  for (int left = 2 + attn_recipe_below(r, 3); left; --left) {
    attn_point a, b;
    a.x = attn_recipe_between(r, 0, last_pixel);
    a.y = attn_recipe_between(r, 0, last_pixel);
    float angle = attn_recipe_between(r, 0, turn), length = attn_recipe_between(r, 4, 9);
    float radius = attn_recipe_between(r, .5F, 1), ink = attn_recipe_between(r, .3F, .8F);
    b = (attn_point){a.x + length * cosf(angle), a.y + length * sinf(angle)};
    attn_draw_capsule(image, a, b, radius, ink);
  }
  for (int i = 0; i < PIXELS; ++i) image->pixels[i] += noise * attn_recipe_normal(r);
  return digit;
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  if (o->vocabulary < ATTN_IMAGE_TOKENS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least %d",
                     task->name, (long long)o->vocabulary, ATTN_IMAGE_TOKENS);
  if (o->length == PIXELS) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "%s: a length of %lld, expected %d: the pixels of an image", task->name,
                   (long long)o->length, PIXELS);
}

static size_t scratch_bytes(const attn_task *task, const attn_task_options *o) {
  (void)task, (void)o;
  return PIXELS * sizeof(float);
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  attn_recipe r = attn_recipe_from(random);
  attn_image image = {.size = ATTN_DIGIT_SIZE, .pixels = scratch};
  (void)task;
  labels[o->length - 1] = 1 + attn_draw_digit(&r, &image);
  attn_image_tokens(&image, inputs);
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 1.0 / CLASSES;
}

const attn_task attn_task_digits = {
    .name = "digits",
    .summary = "which digit an image shows, as Long Range Arena's image task (arXiv 2011.04006)",
    .usual = {.vocabulary = ATTN_IMAGE_TOKENS, .length = PIXELS},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};
