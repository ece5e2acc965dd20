/* The fast transform: one factor of the Kronecker product after another.
 *
 * For factor j a row is an array (c_1 ... c_{j-1}, c_j, lanes): B_j mixes the middle axis, and
 * everything to its right is a lane of a vector register. Sylvester's factor comes last, where its
 * blocks are contiguous. The diagonal is applied within the first pass, or the last for the
 * transpose, so it needs no pass of its own. */
#include "rotate/hadamard.h"

#include "kernels/kernels.h"

lbq_status
lbq_hadamard_prepare(lbq_hadamard *hadamard)
{
    ptrdiff_t rest = hadamard->n, cost = 0;
    LBQ_REQUIRE(rest >= 1, LBQ_BAD_VALUE, "n is %td, expected at least 1", rest);
    for (int j = 0; j < hadamard->factors; j++) {
        const ptrdiff_t order = hadamard->orders[j];
        LBQ_REQUIRE(order >= 1 && order <= LBQ_MAX_ORDER && rest % order == 0,
                    LBQ_BAD_VALUE,
                    "orders[%d] is %td, expected a divisor of %td up to %d",
                    j,
                    order,
                    rest,
                    LBQ_MAX_ORDER);
        rest /= order;
        cost += order;
    }
    LBQ_REQUIRE((rest & (rest - 1)) == 0,
                LBQ_BAD_VALUE,
                "n = %td divided by the product of orders is %td, expected a power of two",
                hadamard->n,
                rest);
    hadamard->length = rest;
    for (; rest > 1; rest /= 2)
        cost++;
    hadamard->cost = cost;
    return LBQ_OK;
}

size_t
lbq_hadamard_scratch(const lbq_hadamard *hadamard)
{
    ptrdiff_t largest = 0;
    for (int j = 0; j < hadamard->factors; j++)
        largest = hadamard->orders[j] > largest ? hadamard->orders[j] : largest;
    return (size_t)largest * LBQ_HADAMARD_LANES;
}

void
lbq_hadamard_forward(const lbq_hadamard *hadamard, ptrdiff_t rows, float *X, float *scratch)
{
    const ptrdiff_t n = hadamard->n;
    for (float *x = X; x < X + rows * n; x += n) {
        const float *before = hadamard->diagonal, *B_T = hadamard->bases;
        ptrdiff_t blocks = 1, block = n;
        for (int j = 0; j < hadamard->factors; j++) {
            const ptrdiff_t c = hadamard->orders[j], lanes = block / c;
            B_T += c * c;
            for (ptrdiff_t at = 0; at < n; at += block)
                lbq_kernel.hadamard_base(
                    B_T, c, lanes, before ? before + at : NULL, NULL, x + at, scratch);
            before = NULL;
            blocks *= c;
            block = lanes;
            B_T += c * c;
        }
        lbq_kernel.hadamard_sylvester(block, blocks, before, NULL, x);
    }
}

void
lbq_hadamard_backward(const lbq_hadamard *hadamard, ptrdiff_t rows, float *X, float *scratch)
{
    const ptrdiff_t n = hadamard->n;
    ptrdiff_t blocks = 1;
    const float *end = hadamard->bases;
    for (int j = 0; j < hadamard->factors; j++) {
        blocks *= hadamard->orders[j];
        end += 2 * hadamard->orders[j] * hadamard->orders[j];
    }
    for (float *x = X; x < X + rows * n; x += n) {
        const float *after = hadamard->factors ? NULL : hadamard->diagonal, *B = end;
        lbq_kernel.hadamard_sylvester(hadamard->length, blocks, NULL, after, x);
        ptrdiff_t lanes = hadamard->length;
        for (int j = hadamard->factors - 1; j >= 0; j--) {
            const ptrdiff_t c = hadamard->orders[j];
            after = j ? NULL : hadamard->diagonal;
            B -= 2 * c * c;
            for (ptrdiff_t at = 0; at < n; at += c * lanes)
                lbq_kernel.hadamard_base(
                    B, c, lanes, NULL, after ? after + at : NULL, x + at, scratch);
            lanes *= c;
        }
    }
}
