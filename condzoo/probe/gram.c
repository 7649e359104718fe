/* Sums of x x^T over a layer's rows, which `native.py` compiles and calls: float32, float64 or bfloat16 data, products
 * in float64 (gram_double) or in float32 (gram_float). No library of matrices has a product of a tall matrix with itself
 * that reads it once, converts it on the way and leaves out the half that is symmetric.
 */

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR 64
#define HIGH 8 /* of 32 registers 16 hold sums */
#elif defined(__AVX__)
#define VECTOR 32
#define HIGH 4 /* of 16 registers 8 hold sums */
#else
#define VECTOR 16
#define HIGH 4
#endif
#define LONGEST 256  /* rows of a tile */
#define CHAIN 16     /* of float32: numbers that are added one after another */
#define CACHED 32768 /* bytes of a tile that lies row by row */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT, DOUBLE, BFLOAT16 };

/* data[pieces, groups, dim, rows], with the distance between two neighbours along each, in numbers of `size` bytes. */
struct columns {
    const void *data;
    int64_t type, size, pieces, groups, dim, rows, next_piece, next_group, next_dim, next_row;
};

INLINE float of_bfloat16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

#define REAL double
#include "gram.h"
#undef REAL
#define REAL float
#include "gram.h"
