// Attention of few rows over many keys, as in decoding.
//
// A block takes ROWS = 4 TR rows of one KV head, a row being one query of one of the heads that share it, and a run of
// keys, in steps of 128. Each of its four warps has TR rows to itself: every lane scores them against keys l, l + 32, ..,
// then keeps four columns of every 128 of their results. So a value from shared memory, whose reading bounds such kernels,
// is multiplied TR or four times. Results of runs are left unnormalised for `combine`, unless there is one run.

#define KEYS 128
// Columns of a piece of queries and keys; keys of a piece of values, which is 128 columns wide.
#define CUT 32
#define PADDED (CUT + 4)
#define TURNS ((DV + 127) / 128)

// Spans hold: first query row, queries, first key row, keys. Items: span, first row, first key, end of its keys.
extern "C" __global__ void __launch_bounds__(128)
    decode(const uint4* spans, const uint4* items, const float* q, const float* k, const float* v, float* result,
           float2* heights, unsigned int group, unsigned int kv_heads, unsigned int dk, float scale, float cap,
           unsigned int window, unsigned int direct, size_t k_columns, size_t k_start, size_t k_stride, size_t v_columns,
           size_t v_start, size_t v_stride) {
    __shared__ __align__(16) float qs[ROWS * PADDED];
    // Keys, then values.
    __shared__ __align__(16) float ks[KEYS * PADDED];
    // Weights of the keys.
    __shared__ __align__(16) float ps[ROWS * KEYS];
    unsigned int t = threadIdx.x;
    unsigned int lane = t % 32;
    unsigned int row0 = t / 32 * TR;
    uint4 item = items[blockIdx.x];
    uint4 span = spans[item.x];
    unsigned int kv_head = blockIdx.y;
    unsigned int rows = span.y * group;
    // Whether this warp has any row.
    bool busy = item.y + row0 < rows;
    // Keys that the queries of the span do not count in: the first query sees one more than these.
    unsigned int before = span.w - span.y;
    // Keys that each row sees: begin .. end.
    unsigned int begin[TR], end[TR];
#pragma unroll
    for (int i = 0; i < TR; i++) {
        unsigned int m = min(item.y + row0 + i, rows - 1);
        end[i] = before + m / group + 1;
        begin[i] = window != 0 && end[i] > window ? end[i] - window : 0;
    }
    // Keys that any row of the tile sees, within this item.
    unsigned int tile_end = min(before + (min(item.y + ROWS, rows) - 1) / group + 1, item.w);
    unsigned int tile_begin = item.z;
    unsigned int first_end = before + item.y / group + 1;
    if (window != 0 && first_end > window) {
        tile_begin = max(tile_begin, (first_end - window) / KEYS * KEYS);
    }
    // What this thread reads of queries and keys: columns `column` and on of rows `reader`, `reader` + 16, ..
    unsigned int reader = t / 8;
    unsigned int column = t % 8 * 4;
    const unsigned int Q_TURNS = (ROWS + 15) / 16;
    const float* q_rows[Q_TURNS];
#pragma unroll
    for (int i = 0; i < Q_TURNS; i++) {
        unsigned int m = min(item.y + min(reader + 16 * i, ROWS - 1u), rows - 1);
        q_rows[i] = q + ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * dk;
    }
    const float* k_first = k + (size_t)span.z * k_columns + k_start + kv_head * k_stride;
    const float* v_first = v + (size_t)span.z * v_columns + v_start + kv_head * v_stride;
    float4 q_next[Q_TURNS], next[8];

// Begin to read a piece of queries and keys, or of values. Keys that nobody sees are read as the last: their weight is 0.
#define FETCH_KEYS(key0, d0)                                                                                          \
    _Pragma("unroll") for (int i = 0; i < Q_TURNS; i++) {                                                             \
        q_next[i] = fetch(q_rows[i], (d0) + column, dk);                                                              \
    }                                                                                                                 \
    _Pragma("unroll") for (int i = 0; i < 8; i++) {                                                                   \
        next[i] = fetch(k_first + min((key0) + reader + 16 * i, tile_end - 1) * k_columns, (d0) + column, dk);        \
    }
#define FETCH_VALUES(key0, d0)                                                                                        \
    _Pragma("unroll") for (int i = 0; i < 8; i++) {                                                                   \
        next[i] = fetch(v_first + min((key0) + t / 32 + 4 * i, tile_end - 1) * v_columns, (d0) + 4 * lane, DV);       \
    }

    float acc[TURNS][TR][4];
    float height[TR], total[TR];
#pragma unroll
    for (int i = 0; i < TR; i++) {
        height[i] = LOWEST;
        total[i] = 0.0f;
#pragma unroll
        for (int n = 0; n < TURNS; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                acc[n][i][j] = 0.0f;
            }
        }
    }
    if (tile_begin < tile_end) {
        FETCH_KEYS(tile_begin, 0)
    }
    for (unsigned int key0 = tile_begin; key0 < tile_end; key0 += KEYS) {
        float s[TR][4];
#pragma unroll
        for (int i = 0; i < TR; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = 0.0f;
            }
        }
        for (unsigned int d0 = 0; d0 < dk; d0 += CUT) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; i++) {
                *(float4*)&ks[(reader + 16 * i) * PADDED + column] = next[i];
            }
#pragma unroll
            for (int i = 0; i < Q_TURNS; i++) {
                if (reader + 16 * i < ROWS) {
                    *(float4*)&qs[(reader + 16 * i) * PADDED + column] = q_next[i];
                }
            }
            __syncthreads();
            if (d0 + CUT < dk) {
                FETCH_KEYS(key0, d0 + CUT)
            } else {
                FETCH_VALUES(key0, 0)
            }
            if (busy) {
#pragma unroll
                for (int d = 0; d < CUT; d += 4) {
                    float4 b[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        b[j] = four(&ks[(lane + 32 * j) * PADDED + d]);
                    }
#pragma unroll
                    for (int i = 0; i < TR; i++) {
                        float4 a = four(&qs[(row0 + i) * PADDED + d]);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            s[i][j] += a.x * b[j].x;
                            s[i][j] += a.y * b[j].y;
                            s[i][j] += a.z * b[j].z;
                            s[i][j] += a.w * b[j].w;
                        }
                    }
                }
            }
        }
        float shrink[TR];
#pragma unroll
        for (int i = 0; i < TR; i++) {
            float own = LOWEST;
            bool seen[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                unsigned int key = key0 + lane + 32 * j;
                s[i][j] *= scale;
                if (cap > 0.0f) {
                    s[i][j] = cap * tanhf(s[i][j] / cap);
                }
                seen[j] = key >= begin[i] && key < end[i] && key < tile_end;
                own = seen[j] ? fmaxf(own, s[i][j]) : own;
            }
            float top = fmaxf(height[i], largest<32>(own));
            shrink[i] = expf(height[i] - top);
            height[i] = top;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float weight = seen[j] ? expf(s[i][j] - top) : 0.0f;
                ps[(row0 + i) * KEYS + lane + 32 * j] = weight;
                sum += weight;
            }
            total[i] = total[i] * shrink[i] + sum_of<32>(sum);
        }
        // Keys beyond the last have no weight: their pieces are left out.
        unsigned int left = min(tile_end - key0, (unsigned int)KEYS);
#pragma unroll
        for (int n = 0; n < TURNS; n++) {
#pragma unroll
            for (int i = 0; i < TR; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    acc[n][i][j] *= shrink[i];
                }
            }
#pragma unroll 1
            for (unsigned int part = 0; part < left; part += CUT) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    *(float4*)&ks[(t / 32 + 4 * i) * 128 + 4 * lane] = next[i];
                }
                __syncthreads();
                if (part + CUT < left) {
                    FETCH_VALUES(key0 + part + CUT, 128 * n)
                } else if (n + 1 < TURNS) {
                    FETCH_VALUES(key0, 128 * (n + 1))
                } else if (key0 + KEYS < tile_end) {
                    FETCH_KEYS(key0 + KEYS, 0)
                }
                if (busy && 128 * n + 4 * lane < DV) {
#pragma unroll
                    for (int key = 0; key < CUT; key += 4) {
                        float4 b[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            b[j] = four(&ks[(key + j) * 128 + 4 * lane]);
                        }
#pragma unroll
                        for (int i = 0; i < TR; i++) {
                            float4 a = four(&ps[(row0 + i) * KEYS + part + key]);
                            float weights[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                acc[n][i][0] += weights[j] * b[j].x;
                                acc[n][i][1] += weights[j] * b[j].y;
                                acc[n][i][2] += weights[j] * b[j].z;
                                acc[n][i][3] += weights[j] * b[j].w;
                            }
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TR; i++) {
        unsigned int m = item.y + row0 + i;
        if (m < rows) {
            float factor = 1.0f;
            size_t part_row = ((size_t)blockIdx.x * kv_heads + kv_head) * ROWS + row0 + i;
            size_t to = part_row * DV;
            if (direct != 0) {
                factor = 1.0f / total[i];
                to = ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * DV;
            } else if (lane == 0) {
                heights[part_row] = make_float2(height[i], total[i]);
            }
#pragma unroll
            for (int n = 0; n < TURNS; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    unsigned int at = 128 * n + 4 * lane + j;
                    if (at < DV) {
                        result[to + at] = acc[n][i][j] * factor;
                    }
                }
            }
        }
    }
}
