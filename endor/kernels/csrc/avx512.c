#include "endor.h"
const endor_ops *endor_avx512_ops(void) { return NULL; }
