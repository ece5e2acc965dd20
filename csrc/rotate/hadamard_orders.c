/* Base matrices: Paley's Hadamard matrices, Hartley's orthogonal one, and how they multiply to n.
 *
 * Paley, "On orthogonal matrices", 1933. With chi the quadratic character of GF(q), q a prime
 * power, and Q[a][b] = chi(a - b):
 *     q = 3 mod 4:  order q + 1,      I + [0 1^T; -1 Q]
 *     q = 1 mod 4:  order 2 (q + 1),  C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1],  C = [0 1^T; 1 Q]
 * Hartley, "A more symmetrical Fourier analysis", 1942: B[i][j] = cas(2 pi i j / c), any order c.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/interrupt.h"
#include "core/memory.h"
#include "rotate/hadamard.h"

enum { MAX_DEGREE = 12 /* 3^8 > LBQ_MAX_ORDER */ };

/* GF(p^m): an element is a number in base p whose digits are the coefficients of its polynomial,
 * the constant term lowest. */
typedef struct {
    int p, m, q;
    int modulus; /* the monic irreducible polynomial, without its leading term */
} field;

static void
to_digits(int p, int count, int number, int *digits)
{
    for (int i = 0; i < count; i++, number /= p)
        digits[i] = number % p;
}

static int
from_digits(int p, int count, const int *digits)
{
    int number = 0;
    for (int i = count - 1; i >= 0; i--)
        number = number * p + digits[i];
    return number;
}

/* Replaces `digits` by its remainder modulo x^degree + lower. */
static void
reduce(int p, int count, int *digits, int degree, const int *lower)
{
    for (int top = count - 1; top >= degree; top--) {
        for (int i = 0; i < degree; i++) {
            int *const digit = &digits[top - degree + i];
            *digit = (*digit + (p - digits[top]) * lower[i]) % p;
        }
        digits[top] = 0;
    }
}

static int
square(const field *f, int a)
{
    int digits[MAX_DEGREE], lower[MAX_DEGREE], product[2 * MAX_DEGREE] = {0};
    to_digits(f->p, f->m, a, digits);
    to_digits(f->p, f->m, f->modulus, lower);
    for (int i = 0; i < f->m; i++)
        for (int j = 0; j < f->m; j++)
            product[i + j] = (product[i + j] + digits[i] * digits[j]) % f->p;
    reduce(f->p, 2 * f->m, product, f->m, lower);
    return from_digits(f->p, f->m, product);
}

static int
minus(const field *f, int a, int b)
{
    if (f->m == 1)
        return a >= b ? a - b : a - b + f->p;
    int left[MAX_DEGREE], right[MAX_DEGREE];
    to_digits(f->p, f->m, a, left);
    to_digits(f->p, f->m, b, right);
    for (int i = 0; i < f->m; i++)
        left[i] = (left[i] - right[i] + f->p) % f->p;
    return from_digits(f->p, f->m, left);
}

static int
power(int base, int exponent)
{
    int result = 1;
    while (exponent-- > 0)
        result *= base;
    return result;
}

/* Whether no monic polynomial of degree 1 to m / 2 divides x^m + candidate. */
static bool
irreducible(int p, int m, int candidate)
{
    for (int degree = 1; degree <= m / 2; degree++)
        for (int divisor = 0; divisor < power(p, degree); divisor++) {
            int digits[MAX_DEGREE + 1], lower[MAX_DEGREE];
            to_digits(p, m, candidate, digits);
            digits[m] = 1;
            to_digits(p, degree, divisor, lower);
            reduce(p, m + 1, digits, degree, lower);
            if (from_digits(p, degree, digits) == 0)
                return false;
        }
    return true;
}

static bool
odd_prime_power(ptrdiff_t q, int *p, int *m)
{
    if (q < 3 || q % 2 == 0)
        return false;
    ptrdiff_t prime = 3;
    while (prime * prime <= q && q % prime != 0)
        prime += 2;
    if (q % prime != 0)
        prime = q;
    *p = (int)prime;
    for (*m = 0; q % prime == 0; q /= prime)
        ++*m;
    return q == 1;
}

static field
field_of(int p, int m)
{
    field f = {.p = p, .m = m, .q = power(p, m)};
    while (!irreducible(p, m, f.modulus))
        f.modulus++; /* one exists for every p and m */
    return f;
}

/* chi (q): 0 at 0, 1 at the other squares, -1 elsewhere. */
static void
character(const field *f, int8_t *chi)
{
    memset(chi, -1, (size_t)f->q);
    for (int a = 1; a < f->q; a++)
        chi[square(f, a)] = 1;
    chi[0] = 0;
}

typedef enum { HARTLEY, PALEY_1, PALEY_2 } construction;

static construction
construction_of(ptrdiff_t order, int *p, int *m)
{
    if (order % 4 == 0 && odd_prime_power(order - 1, p, m))
        return PALEY_1;
    if (order % 4 == 0 && (order / 2 - 1) % 4 == 1 && odd_prime_power(order / 2 - 1, p, m))
        return PALEY_2;
    return HARTLEY;
}

/* Entry (i, j) of [0 1^T; lead Q], of order q + 1. */
static int
bordered(const field *f, const int8_t *chi, int lead, int i, int j)
{
    if (i == 0)
        return j != 0;
    return j == 0 ? lead : chi[minus(f, i - 1, j - 1)];
}

static void
paley_1(const field *f, const int8_t *chi, float *B)
{
    for (int i = 0; i <= f->q; i++)
        for (int j = 0; j <= f->q; j++)
            *B++ = (float)(bordered(f, chi, -1, i, j) + (i == j));
}

static void
paley_2(const field *f, const int8_t *chi, float *B)
{
    static const int outside[2][2] = {{1, 1}, {1, -1}}, inside[2][2] = {{1, -1}, {-1, -1}};
    const int order = 2 * (f->q + 1);
    for (int i = 0; i < order; i++)
        for (int j = 0; j < order; j++)
            *B++ = (float)(bordered(f, chi, 1, i / 2, j / 2) * outside[i % 2][j % 2] +
                           (i / 2 == j / 2) * inside[i % 2][j % 2]);
}

static lbq_status
hartley(ptrdiff_t order, float *B)
{
    const double step = 6.283185307179586477 / (double)order;
    for (ptrdiff_t i = 0; i < order; i++) {
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t j = 0; j < order; j++) {
            const double angle = step * (double)(i * j % order);
            B[i * order + j] = (float)(cos(angle) + sin(angle));
        }
    }
    return LBQ_OK;
}

lbq_status
lbq_hadamard_base(ptrdiff_t order, float *B)
{
    LBQ_REQUIRE(order >= 1 && order <= LBQ_MAX_ORDER,
                LBQ_BAD_VALUE,
                "order is %td, expected 1 to %d",
                order,
                LBQ_MAX_ORDER);
    int p, m;
    const construction kind = construction_of(order, &p, &m);
    if (kind == HARTLEY)
        return hartley(order, B);
    const field f = field_of(p, m);
    int8_t *chi;
    LBQ_TRY(lbq_allocate((size_t)f.q, &chi));
    character(&f, chi);
    (kind == PALEY_1 ? paley_1 : paley_2)(&f, chi, B);
    lbq_free(chi);
    return LBQ_OK;
}

/* A factorisation of n, compared first by Hartley's share of it, then by cost. */
typedef struct {
    ptrdiff_t orders[LBQ_MAX_FACTORS];
    int factors;
    ptrdiff_t hartley; /* product of the orders without a Hadamard matrix */
    double cost;       /* additions per element, counting partly filled registers of 16 lanes */
} plan;

static bool
better(const plan *a, const plan *b)
{
    return a->hartley != b->hartley ? a->hartley < b->hartley : a->cost < b->cost;
}

static double
cost_of(const plan *candidate, ptrdiff_t length)
{
    double cost = 0;
    for (ptrdiff_t rest = length; rest > 1; rest /= 2)
        cost++;
    ptrdiff_t lanes = length;
    for (int j = candidate->factors - 1; j >= 0; j--) {
        cost += (double)candidate->orders[j] * (lanes < 16 ? 16.0 / (double)lanes : 1);
        lanes *= candidate->orders[j];
    }
    return cost;
}

/* Tries every non-increasing list of orders whose product divides `rest` into 2^k; at most one of
 * them is Hartley's, and that one is odd. */
static void
search(plan *candidate, ptrdiff_t rest, ptrdiff_t largest, plan *best)
{
    if ((rest & (rest - 1)) == 0) {
        candidate->cost = cost_of(candidate, rest);
        if (better(candidate, best))
            *best = *candidate;
        return;
    }
    if (candidate->factors == LBQ_MAX_FACTORS)
        return;
    for (ptrdiff_t order = 3; order <= largest && order <= rest; order++) {
        int p, m;
        if (rest % order != 0 || (order & (order - 1)) == 0)
            continue;
        const bool no_hadamard = construction_of(order, &p, &m) == HARTLEY;
        if (no_hadamard && (order % 2 == 0 || candidate->hartley > 1))
            continue;
        candidate->orders[candidate->factors++] = order;
        candidate->hartley *= no_hadamard ? order : 1;
        search(candidate, rest / order, order, best);
        candidate->hartley /= no_hadamard ? order : 1;
        candidate->orders[--candidate->factors] = 0;
    }
}

lbq_status
lbq_hadamard_orders(ptrdiff_t n, ptrdiff_t orders[LBQ_MAX_FACTORS])
{
    LBQ_REQUIRE(n >= 1, LBQ_BAD_VALUE, "n is %td, expected at least 1", n);
    plan candidate = {.hartley = 1}, best = {.hartley = PTRDIFF_MAX};
    search(&candidate, n, LBQ_MAX_ORDER, &best);
    LBQ_REQUIRE(best.hartley < PTRDIFF_MAX,
                LBQ_BAD_VALUE,
                "n is %td, whose odd part needs a base matrix of order over %d; pad n, or use "
                "kind 'orthogonal'",
                n,
                LBQ_MAX_ORDER);
    memcpy(orders, best.orders, sizeof best.orders);
    return LBQ_OK;
}
