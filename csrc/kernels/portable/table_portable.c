/* The portable kernels: plain C, the specification of all others. */
#include "kernels/portable/portable.h"

#ifdef __AVX__
#error "the portable kernels must run on every machine: compile them without AVX flags"
#endif

void
lbq_table_portable(lbq_kernels *table)
{
    *table = (lbq_kernels){
#define X(name, result, parameters) .name = lbq_##name##_portable,
#include "kernels/list.h"
    };
}
