#include "endor.h"
const endor_ops *endor_avx2_ops(void) { return NULL; }
