/* Prototypes of the portable kernels: lbq_<kernel>_portable for every kernel of the list. */
#ifndef LBQ_PORTABLE_H
#define LBQ_PORTABLE_H

#include "kernels/kernels.h"

#define LBQ_PROTOTYPE(name, result, parameters) result lbq_##name##_portable parameters;
LBQ_KERNELS(LBQ_PROTOTYPE)
#undef LBQ_PROTOTYPE

#endif
