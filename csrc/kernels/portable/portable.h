/* Prototypes of the portable kernels: lbq_<kernel>_portable for every kernel of the list. */
#ifndef LBQ_PORTABLE_H
#define LBQ_PORTABLE_H

#include "kernels/kernels.h"

#define X(name, result, parameters) result lbq_##name##_portable parameters;
#include "kernels/list.h"

#endif
