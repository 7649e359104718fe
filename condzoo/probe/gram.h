/* Sums of x x^T over rows x, in numbers of type REAL: included by gram.c, once for each type.
 *
 * Tiles of rows are converted to REAL, and laid out as the data are: coordinate by coordinate where rows lie side by side
 * (images), else row by row (tokens, channels_last). Their products are taken in blocks whose sums stay in registers:
 * a block of coordinates of `HIGH` by two vectors, or of 4 by 4, each of them a vector of sums over every LANES'th row.
 * The sums of a tile are added in double.
 */

#define PASTE(a, b) a##_##b
#define NAMED(a, b) PASTE(a, b)
#define LANES (VECTOR / (int)sizeof(REAL))
#define vector NAMED(vector, REAL)

typedef REAL vector __attribute__((vector_size(VECTOR)));

INLINE double NAMED(sum, REAL)(vector lanes)
{
    double parts[LANES];
    for (int i = 0; i < LANES; i++)
        parts[i] = lanes[i];
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            parts[i] += parts[i + width];
    return parts[0];
}

/* total[i, j] += sum over rows of a_i b_j, i < 4, j < wide; `same`: a is b, of which the upper half is enough. */
INLINE void NAMED(block_by_coordinates, REAL)(
    const REAL *a, const REAL *b, int64_t leading, int64_t rows, double *total, int64_t side, int wide, int same)
{
    vector sums[4][4] = {0};
    for (int64_t row = 0; row < rows; row += LANES) {
        vector x[4], y[4];
        for (int i = 0; i < 4; i++)
            x[i] = *(const vector *)(a + i * leading + row);
        for (int j = 0; j < wide; j++)
            y[j] = *(const vector *)(b + j * leading + row);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < wide; j++)
                if (!same || j >= i)
                    sums[i][j] += x[i] * y[j];
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < wide; j++)
            if (!same || j >= i)
                total[i * side + j] += NAMED(sum, REAL)(sums[i][j]);
}

static void NAMED(multiply_by_coordinates, REAL)(
    const REAL *tile, int64_t leading, int64_t rows, double *total, int64_t side)
{
    for (int64_t i = 0; i < side; i += 4)
        for (int64_t j = i; j < side; j += 4) {
            const REAL *a = tile + i * leading, *b = tile + j * leading;
            double *out = total + i * side + j;
            if (HIGH == 8 && i == j)
                NAMED(block_by_coordinates, REAL)(a, b, leading, rows, out, side, 4, 1);
            else if (HIGH == 8)
                NAMED(block_by_coordinates, REAL)(a, b, leading, rows, out, side, 4, 0);
            else {
                NAMED(block_by_coordinates, REAL)(a, b, leading, rows, out, side, 2, 0);
                NAMED(block_by_coordinates, REAL)(a, b + 2 * leading, leading, rows, out + 2, side, 2, 0);
            }
        }
}

/* total[i, j] += sum over rows of a_i b_j, i < HIGH, j < wide * LANES. */
INLINE void NAMED(block_by_rows, REAL)(
    const REAL *a, const REAL *b, int64_t rows, double *total, int64_t side, int wide)
{
    vector sums[HIGH][2] = {0};
    for (int64_t row = 0; row < rows; row++) {
        vector y[2];
        for (int j = 0; j < wide; j++)
            y[j] = *(const vector *)(b + row * side + j * LANES);
        for (int i = 0; i < HIGH; i++)
            for (int j = 0; j < wide; j++)
                sums[i][j] += a[row * side + i] * y[j];
    }
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < wide; j++)
            for (int lane = 0; lane < LANES; lane++)
                total[i * side + j * LANES + lane] += sums[i][j][lane];
}

static void NAMED(multiply_by_rows, REAL)(const REAL *tile, int64_t rows, double *total, int64_t side)
{
    for (int64_t j = 0; j < side; j += 2 * LANES)
        for (int64_t i = 0; i < side && i < j + 2 * LANES; i += HIGH)
            if (j + LANES < side)
                NAMED(block_by_rows, REAL)(tile + i, tile + j, rows, total + i * side + j, side, 2);
            else
                NAMED(block_by_rows, REAL)(tile + i, tile + j, rows, total + i * side + j, side, 1);
}

/* `count` runs of `length` numbers of x into the tile. */
#define PACK(NAME, TYPE, VALUE)                                                                                        \
    static void NAMED(NAME, REAL)(const TYPE *x, int64_t count, int64_t length, int64_t next_run, int64_t next,        \
        REAL *tile, int64_t leading)                                                                                   \
    {                                                                                                                  \
        for (int64_t run = 0; run < count; run++, x += next_run, tile += leading)                                      \
            if (next == 1)                                                                                             \
                for (int64_t i = 0; i < length; i++)                                                                   \
                    tile[i] = (REAL)VALUE(x[i]);                                                                       \
            else                                                                                                       \
                for (int64_t i = 0; i < length; i++)                                                                   \
                    tile[i] = (REAL)VALUE(x[i * next]);                                                                \
    }
PACK(pack_float, float, )
PACK(pack_double, double, )
PACK(pack_bfloat16, uint16_t, of_bfloat16)

INLINE void NAMED(pack, REAL)(const struct columns *c, const char *x, int64_t count, int64_t length, int64_t next_run,
    int64_t next, REAL *tile, int64_t leading)
{
    if (c->type == FLOAT)
        NAMED(pack_float, REAL)((const float *)x, count, length, next_run, next, tile, leading);
    else if (c->type == DOUBLE)
        NAMED(pack_double, REAL)((const double *)x, count, length, next_run, next, tile, leading);
    else
        NAMED(pack_bfloat16, REAL)((const uint16_t *)x, count, length, next_run, next, tile, leading);
}

/* Rows first to last, of all pieces one after another, of one group. The tile's coordinates dim to side are 0. */
static void NAMED(add_rows, REAL)(const struct columns *c, const char *data, int64_t first, int64_t last, int by_rows,
    REAL *tile, int64_t leading, int64_t longest, double *total, int64_t side)
{
    int64_t filled = 0;
    for (int64_t row = first; row < last;) {
        int64_t piece = row / c->rows, start = row % c->rows, count = c->rows - start;
        if (count > last - row)
            count = last - row;
        if (count > longest - filled)
            count = longest - filled;
        const char *x = data + (piece * c->next_piece + start * c->next_row) * c->size;
        if (by_rows)
            NAMED(pack, REAL)(c, x, count, c->dim, c->next_row, c->next_dim, tile + filled * leading, leading);
        else
            NAMED(pack, REAL)(c, x, c->dim, count, c->next_dim, c->next_row, tile + filled, leading);
        filled += count;
        row += count;
        if (filled < longest && row < last)
            continue;
        if (by_rows)
            NAMED(multiply_by_rows, REAL)(tile, filled, total, side);
        else {
            int64_t padded = (filled + LANES - 1) / LANES * LANES;
            for (int64_t i = 0; i < c->dim; i++)
                for (int64_t rest = filled; rest < padded; rest++)
                    tile[i * leading + rest] = 0;
            NAMED(multiply_by_coordinates, REAL)(tile, leading, padded, total, side);
        }
        filled = 0;
    }
}

/* out[groups, dim, dim]; 0, or 1 where there is no memory. Each group's rows are cut into `slices`, shared out among the
 * threads: what a slice adds up does not depend on which one does. */
int NAMED(gram, REAL)(const struct columns *c, double *out, int threads, int slices)
{
    int by_rows = c->next_dim == 1 && c->next_row != 1;
    int64_t step = !by_rows ? 4 : LANES < HIGH ? HIGH : LANES, side = (c->dim + step - 1) / step * step;
    int64_t size = side * side, rows = c->pieces * c->rows, longest = LONGEST;
    if (sizeof(REAL) == 4 && longest > (by_rows ? CHAIN : CHAIN * LANES))
        longest = by_rows ? CHAIN : CHAIN * LANES;
    while (by_rows && longest > CHAIN && longest * side * (int64_t)sizeof(REAL) > CACHED)
        longest /= 2;
    /* coordinates a power of two apart would share the same few lines of a cache */
    int64_t leading = by_rows ? side : longest + LANES, numbers = by_rows ? longest * side : side * leading;
    double *totals = calloc((size_t)(c->groups * slices * size), sizeof(double));
    REAL *tiles = aligned_alloc(VECTOR, (size_t)(threads * numbers) * sizeof(REAL));
    if (!totals || !tiles) {
        free(totals);
        free(tiles);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        REAL *tile = tiles + omp_get_thread_num() * numbers;
        memset(tile, 0, (size_t)numbers * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t part = 0; part < c->groups * slices; part++) {
            int64_t group = part / slices, slice = part % slices;
            NAMED(add_rows, REAL)(c, (const char *)c->data + group * c->next_group * c->size, rows * slice / slices,
                rows * (slice + 1) / slices, by_rows, tile, leading, longest, totals + part * size, side);
        }
    }
    for (int64_t group = 0; group < c->groups; group++) {
        double *total = totals + group * slices * size;
        for (int64_t slice = 1; slice < slices; slice++)
            for (int64_t i = 0; i < size; i++)
                total[i] += total[slice * size + i];
        for (int64_t i = 0; i < c->dim; i++)
            for (int64_t j = i; j < c->dim; j++)
                out[(group * c->dim + i) * c->dim + j] = out[(group * c->dim + j) * c->dim + i] = total[i * side + j];
    }
    free(totals);
    free(tiles);
    return 0;
}

#undef LANES
#undef PACK
#undef vector
#undef NAMED
#undef PASTE
