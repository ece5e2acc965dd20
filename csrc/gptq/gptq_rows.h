/* The rounding of one tile of rows, in the arithmetic REAL; included once for each by gptq.c.
 *
 * Before a block of columns one matrix product adds the errors of all columns before it. Inside
 * the block LANES rows go together, transposed: a column's errors are LANES neighbours, and the
 * sum over earlier columns of the block is a loop that vectorises and stays in the first-level
 * cache. */

/* sum[l] += sum_i r[i] e[i, l]. */
static inline void
NAME(fold)(ptrdiff_t count, const REAL *r, const REAL *e, REAL *sum)
{
    REAL total[LANES];
    memcpy(total, sum, sizeof total);
    for (ptrdiff_t i = 0; i < count; i++)
        for (int l = 0; l < LANES; l++)
            total[l] += r[i] * e[i * LANES + l];
    memcpy(sum, total, sizeof total);
}

/* Scale and offset of the columns [begin, end) of the block, for each row of the lanes, from the
 * weights as published GPTQ would have changed them by now: w + x with x R_gg = feedback, R_gg
 * the group's own square of R. */
static void
NAME(fit_group)(const run_state *state, const lanes *at, ptrdiff_t begin, ptrdiff_t end,
                const REAL *transposed, const REAL *w, const REAL *feedback, REAL *x,
                double *values)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const order = state->order + at->column;
    const ptrdiff_t group = order[begin] / p->group, count = end - begin;
    for (ptrdiff_t j = begin; j < end; j++) {
        REAL *const xj = x + (j - begin) * LANES;
        REAL sum[LANES] = {0};
        NAME(fold)(j - begin, transposed + j * state->width + begin, x, sum);
        for (int l = 0; l < LANES; l++)
            xj[l] = feedback[j * LANES + l] - sum[l];
    }
    double *const importance = p->importance ? values + count : NULL;
    for (ptrdiff_t j = 0; importance && j < count; j++)
        importance[j] = (double)p->importance[order[begin + j]];
    for (ptrdiff_t l = 0; l < at->rows; l++) {
        for (ptrdiff_t j = 0; j < count; j++)
            values[j] = (double)(w[(begin + j) * LANES + l] + x[j * LANES + l]);
        double scale, offset;
        lbq_code_fit(p->code, p->range, count, values, importance, &scale, &offset);
        state->scale[(at->row + l) * state->groups + group] = (float)scale;
        state->offset[(at->row + l) * state->groups + group] = (float)offset;
    }
}

/* Rounds column j of the block for each row of the lanes, and leaves the errors in e. */
static void
NAME(round_column)(const run_state *state, const lanes *at, ptrdiff_t j, const REAL *w,
                   const REAL *target, REAL *e)
{
    const lbq_gptq_problem *const p = state->problem;
    const ptrdiff_t column = state->order[at->column + j], group = column / p->group;
    for (ptrdiff_t l = 0; l < at->rows; l++) {
        const ptrdiff_t row = at->row + l;
        const double scale = state->scale[row * state->groups + group];
        const double offset = state->offset[row * state->groups + group];
        const uint8_t code = lbq_code_encode(p->code, (double)target[l], scale, offset);
        state->codes[row * p->cols + column] = code;
        e[l] = w[l] - (REAL)lbq_code_decode(p->code, code, scale, offset);
    }
}

/* One block for the rows of the lanes: `feedback` (width, LANES) comes with the errors of the
 * columns before the block. */
static void
NAME(round_block)(const run_state *state, const lanes *at, ptrdiff_t width, const REAL *transposed,
                  const REAL *w, REAL *feedback, REAL *e, REAL *x, double *values)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const order = state->order + at->column;
    for (ptrdiff_t begin = 0, end; begin < width; begin = end) {
        end = width;
        if (state->refit) {
            for (end = begin + 1; end < width && order[end] / p->group == order[begin] / p->group;)
                end++;
            for (ptrdiff_t j = begin; j < end; j++)
                NAME(fold)(begin, transposed + j * state->width, e, feedback + j * LANES);
            NAME(fit_group)(state, at, begin, end, transposed, w, feedback, x, values);
        }
        for (ptrdiff_t j = begin; j < end; j++) {
            REAL target[LANES];
            memcpy(target, feedback + j * LANES, sizeof target);
            NAME(fold)(j - begin, transposed + j * state->width + begin, e + begin * LANES, target);
            for (int l = 0; l < LANES; l++)
                target[l] += w[j * LANES + l];
            NAME(round_column)(state, at, j, w + j * LANES, target, e + j * LANES);
        }
    }
}

/* Scratch of one thread, in bytes; and its parts. */
typedef struct {
    REAL *errors;               /* (tile, cols) */
    REAL *products;             /* (tile, width) */
    REAL *transposed;           /* (width, width): row j is column j of the block's square of R */
    REAL *w, *feedback, *e, *x; /* (width, LANES) */
    double *values;             /* (2, width) */
} NAME(scratch);

static size_t
NAME(scratch_of)(const run_state *state, char *base, NAME(scratch) * scratch)
{
    const size_t width = (size_t)state->width, tile = (size_t)state->tile, real = sizeof(REAL);
    const size_t sizes[] = {
        tile * (size_t)state->problem->cols * real,
        tile * width * real,
        width * width * real,
        width * LANES * real,
        width * LANES * real,
        width * LANES * real,
        width * LANES * real,
        2 * width * sizeof(double),
    };
    size_t at[9] = {0};
    for (int i = 0; i < 8; i++)
        at[i + 1] = at[i] + lbq_padded(sizes[i]);
    if (scratch)
        *scratch = (NAME(scratch)){
            .errors = (REAL *)(base + at[0]),
            .products = (REAL *)(base + at[1]),
            .transposed = (REAL *)(base + at[2]),
            .w = (REAL *)(base + at[3]),
            .feedback = (REAL *)(base + at[4]),
            .e = (REAL *)(base + at[5]),
            .x = (REAL *)(base + at[6]),
            .values = (double *)(base + at[7]),
        };
    return at[8];
}

static lbq_status
NAME(round_rows)(void *context, ptrdiff_t index, int worker)
{
    const run_state *const state = context;
    const ptrdiff_t cols = state->problem->cols, first = index * state->tile;
    const ptrdiff_t rows = smaller(state->tile, state->problem->rows - first);
    const REAL *const R = state->R;
    NAME(scratch) s;
    NAME(scratch_of)(state, state->scratch + (size_t)worker * state->scratch_bytes, &s);
    for (ptrdiff_t block = 0, end; block < cols; block = end) {
        end = state->block_end[block];
        const ptrdiff_t width = end - block;
        if (block > 0)
            GEMM(CblasRowMajor,
                 CblasNoTrans,
                 CblasNoTrans,
                 (int)rows,
                 (int)width,
                 (int)block,
                 1,
                 s.errors,
                 (int)cols,
                 R + block,
                 (int)cols,
                 0,
                 s.products,
                 (int)state->width);
        for (ptrdiff_t i = 0; i < width; i++)
            for (ptrdiff_t j = i + 1; j < width; j++)
                s.transposed[j * state->width + i] = R[(block + i) * cols + block + j];
        for (ptrdiff_t row = 0; row < rows; row += LANES) {
            const lanes at = {first + row, smaller(LANES, rows - row), block};
            memset(s.w, 0, (size_t)width * LANES * sizeof(REAL));
            memset(s.e, 0, (size_t)width * LANES * sizeof(REAL));
            memset(s.feedback, 0, (size_t)width * LANES * sizeof(REAL));
            for (ptrdiff_t l = 0; l < at.rows; l++) {
                const float *const W = state->W + (at.row + l) * cols;
                const REAL *const product = s.products + (row + l) * state->width;
                for (ptrdiff_t j = 0; j < width; j++) {
                    s.w[j * LANES + l] = (REAL)W[state->order[block + j]];
                    if (block > 0)
                        s.feedback[j * LANES + l] = product[j];
                }
            }
            NAME(round_block)(state, &at, width, s.transposed, s.w, s.feedback, s.e, s.x, s.values);
            for (ptrdiff_t l = 0; l < at.rows; l++)
                for (ptrdiff_t j = 0; j < width; j++)
                    s.errors[(row + l) * cols + block + j] = s.e[j * LANES + l];
        }
    }
    return LBQ_OK;
}
