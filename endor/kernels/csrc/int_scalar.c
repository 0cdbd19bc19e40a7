/* Codec `int` in portable C. */
#include "int.h"

static const uint8_t *rows(const uint32_t *table, uint32_t *states, const uint8_t *words, uint64_t count,
                           uint8_t *symbols) {
    for (uint64_t row = 0; row < count; row++, symbols += ENDOR_LANES) {
        for (int i = 0; i < ENDOR_LANES; i++) {
            uint32_t x = states[i], entry = table[x % ENDOR_SCALE];
            symbols[i] = (uint8_t)entry;
            x = (entry >> 20) * (x / ENDOR_SCALE) + (entry >> 8 & (ENDOR_SCALE - 1));
            uint32_t need = x < ENDOR_LOWEST;
            states[i] = need ? x << 16 | load16(words) : x;
            words += 2 * need;
        }
    }
    return words;
}

static void low(const uint8_t *bits, int shift, uint64_t n, uint8_t *out) {
    for (uint64_t i = 0; i < n; i += 8, bits += shift) {
        uint64_t v = load64(bits);
        for (int j = 0; j < 8; j++) out[i + (uint64_t)j] = (uint8_t)(v >> j * shift & ((1u << shift) - 1));
    }
}

static void values(const endor_values *v, uint64_t n, void *out) {
    for (uint64_t i = 0; i < n; i++) {
        int32_t code = (v->base + v->symbols[i]) * (1 << v->shift) + (v->low ? v->low[i] : 0);
        if (v->kind == ENDOR_CODES) {
            ((int32_t *)out)[i] = code;
            continue;
        }
        float value = (v->levels ? v->levels[v->symbols[i]] : (float)code) * v->steps[i];
        uint16_t bits = v->kind == ENDOR_BF16 ? endor_to_bf16(value) : v->kind == ENDOR_F16 ? endor_to_half(value) : 0;
        if (v->kind == ENDOR_F32) memcpy((uint8_t *)out + 4 * i, &value, 4);
        else memcpy((uint8_t *)out + 2 * i, &bits, 2);
    }
}

/* 32 lanes that do not wait for each other keep the divider busy. */
static uint16_t *code(const uint32_t *table, uint32_t *states, const uint8_t *symbols, uint64_t rows, uint16_t *at) {
    for (uint64_t i = rows * ENDOR_LANES; i--;) {
        uint32_t entry = table[symbols[i]], frequency = entry & 0xffff, state = states[i % ENDOR_LANES];
        if (state >= frequency << 20) {
            *--at = (uint16_t)state;
            state >>= 16;
        }
        uint32_t quotient = state / frequency;
        states[i % ENDOR_LANES] = quotient * ENDOR_SCALE + (state - quotient * frequency) + (entry >> 16);
    }
    return at;
}

const endor_int_ops *endor_int_scalar_ops(void) {
    static const endor_int_ops ops = {rows, low, values, code};
    return &ops;
}
