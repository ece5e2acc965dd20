/* Tiles of tokens: logits, their gradient in place, and the products with it. */
#include "transformer/head_backward.h"

#include "core/memory.h"
#include "core/threads.h"

/* Logits of a tile. BLAS packs the head again for each: 128 MiB keep that below a tenth of the time
 * for a vocabulary of 50,000. */
enum { TILE_FLOATS = 1 << 25, LEAST_TOKENS = 32 };

typedef struct {
    float *logits, *teacher;
    int32_t *target;
    double *loss;
} scratch;

/* Takes the scratch of a tile, or counts its bytes where the arena has no memory yet. */
static size_t
take(ptrdiff_t tokens, ptrdiff_t vocab, bool teacher, lbq_arena *arena, scratch *s)
{
    const size_t logits = lbq_padded(sizeof(float) * (size_t)(tokens * vocab));
    const size_t targets = lbq_padded(sizeof(int32_t) * (size_t)tokens);
    const size_t losses = lbq_padded(sizeof(double) * (size_t)tokens);
    if (arena->base) {
        s->logits = lbq_arena_take(arena, logits);
        s->teacher = teacher ? lbq_arena_take(arena, logits) : NULL;
        s->target = lbq_arena_take(arena, targets);
        s->loss = lbq_arena_take(arena, losses);
    }
    return (teacher ? 2 : 1) * logits + targets + losses;
}

/* Of the tokens [first, first + count). */
static lbq_status
tile_backward(const lbq_decoder *decoder, const lbq_objective *objective, ptrdiff_t first,
              ptrdiff_t count, const float *y, const lbq_linear_gradient *gradient,
              const scratch *s, double *loss, float *dy)
{
    const lbq_linear *const head = decoder->head ? decoder->head : decoder->embedding;
    const lbq_decoder *const teacher = objective->teacher;
    const int32_t *target = objective->target ? objective->target + first : NULL;
    LBQ_TRY(lbq_decoder_head(decoder, count, y, s->logits));
    if (teacher)
        LBQ_TRY(lbq_decoder_head(
            teacher, count, objective->teacher_hidden + first * teacher->hidden, s->teacher));
    if (objective->uniform) {
        LBQ_TRY(lbq_draw(count, decoder->vocab, s->logits, objective->uniform + first, s->target));
        target = s->target;
    }
    LBQ_TRY(lbq_loss_gradient(&objective->loss,
                              count,
                              decoder->vocab,
                              s->logits,
                              s->teacher,
                              target,
                              objective->weight ? objective->weight + first : NULL,
                              loss ? loss : s->loss));
    return lbq_linear_backward(head, count, y, NULL, s->logits, gradient, false, dy);
}

lbq_status
lbq_head_backward(const lbq_decoder *decoder, const lbq_objective *objective, ptrdiff_t tokens,
                  const float *y, const lbq_linear_gradient *gradient, double *loss, float *dy)
{
    const lbq_decoder *const teacher = objective->teacher;
    LBQ_REQUIRE(!teacher || teacher->vocab == decoder->vocab,
                LBQ_BAD_SHAPE,
                "the teacher's vocabulary has %td tokens, the model's %td",
                teacher ? teacher->vocab : 0,
                decoder->vocab);
    const ptrdiff_t most = TILE_FLOATS / decoder->vocab;
    const ptrdiff_t tile = lbq_smaller(tokens, most > LEAST_TOKENS ? most : LEAST_TOKENS);
    scratch s = {0};
    lbq_arena arena = {0};
    LBQ_TRY(lbq_arena_open(&arena, take(tile, decoder->vocab, teacher, &arena, &s)));
    take(tile, decoder->vocab, teacher, &arena, &s);
    lbq_status status = LBQ_OK;
    for (ptrdiff_t t = 0; t < tokens && status == LBQ_OK; t += tile)
        status = tile_backward(decoder,
                               objective,
                               t,
                               lbq_smaller(tile, tokens - t),
                               y + t * decoder->hidden,
                               gradient,
                               &s,
                               loss ? loss + t : NULL,
                               dy ? dy + t * decoder->hidden : NULL);
    lbq_arena_close(&arena);
    return status;
}
