// Causal softmax attention over runs of keys, with running maxima and sums: no matrix of all scores.
//
// A block takes ROWS rows of one KV head, a row being one query of one of the heads that share it, and a run of keys, in
// steps of 32. Thread (r, c) scores rows r, r + 16, .. against keys c, c + 8, .. and keeps columns 4 c .. 4 c + 3 of every
// 32 of their results. It reads shared memory by fours, and has the next piece of keys or values on its way from the card's
// memory while it works on the last. Where a span's keys are cut into several runs, results are left unnormalised for
// `combine`.
// Set from outside: DV, the width of a value; TR, the rows of a thread; FOURS, whether every row begins at a multiple of
// four elements and is one long.

#define KEYS 32
// Columns of a piece of queries, keys or values.
#if TR == 1 && DV % 64 == 0
#define CUT 64
#else
#define CUT 32
#endif
// Four columns of padding keep eight rows off the same banks of shared memory, and fours aligned.
#define PADDED (CUT + 4)
// Columns of a thread: four per started 32.
#define OWN ((DV + 31) / 32 * 4)
// Threads that read a row of a piece, rows they read at once, and how often.
#define READERS (CUT / 4)
#define AT_ONCE (128 / READERS)
#define Q_TURNS (ROWS / AT_ONCE)
#define K_TURNS (KEYS / AT_ONCE)

// Spans hold: first query row, queries, first key row, keys. Items: span, first row, first key, end of its keys.
extern "C" __global__ void __launch_bounds__(128)
    attention(const uint4* spans, const uint4* items, const float* q, const float* k, const float* v, float* result,
              float2* heights, unsigned int group, unsigned int kv_heads, unsigned int dk, float scale, float cap,
              unsigned int window, unsigned int direct, size_t k_columns, size_t k_start, size_t k_stride,
              size_t v_columns, size_t v_start, size_t v_stride) {
    __shared__ __align__(16) float qs[ROWS * PADDED];
    // Keys, then values.
    __shared__ __align__(16) float ks[KEYS * PADDED];
    // Weights of the keys.
    __shared__ __align__(16) float ps[ROWS * (KEYS + 4)];
    unsigned int t = threadIdx.x;
    unsigned int r = t / 8;
    unsigned int c = t % 8;
    uint4 item = items[blockIdx.x];
    uint4 span = spans[item.x];
    unsigned int kv_head = blockIdx.y;
    unsigned int rows = span.y * group;
    // Keys that the queries of the span do not count in: the first query sees one more than these.
    unsigned int before = span.w - span.y;
    // Keys that each row of this thread sees: begin .. end.
    unsigned int begin[TR], end[TR];
#pragma unroll
    for (int i = 0; i < TR; i++) {
        unsigned int m = min(item.y + r + 16 * i, rows - 1);
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
    // What this thread reads: columns `column` and on of some rows.
    unsigned int reader = t / READERS;
    unsigned int column = t % READERS * 4;
    const float* q_rows[Q_TURNS];
#pragma unroll
    for (int i = 0; i < Q_TURNS; i++) {
        unsigned int m = min(item.y + reader + AT_ONCE * i, rows - 1);
        q_rows[i] = q + ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * dk;
    }
    const float* k_first = k + (size_t)span.z * k_columns + k_start + kv_head * k_stride;
    const float* v_first = v + (size_t)span.z * v_columns + v_start + kv_head * v_stride;
    float4 q_next[Q_TURNS], next[K_TURNS];

// Begin to read a piece of queries and keys, or of values. Keys that nobody sees are read as the last: their weight is 0.
#define FETCH_KEYS(key0, d0)                                                                                                 \
    _Pragma("unroll") for (int i = 0; i < Q_TURNS; i++) {                                                                    \
        q_next[i] = fetch(q_rows[i], (d0) + column, dk);                                                                     \
    }                                                                                                                        \
    _Pragma("unroll") for (int i = 0; i < K_TURNS; i++) {                                                                    \
        next[i] = fetch(k_first + min((key0) + reader + AT_ONCE * i, tile_end - 1) * k_columns, (d0) + column, dk);          \
    }
#define FETCH_VALUES(key0, d0)                                                                                               \
    _Pragma("unroll") for (int i = 0; i < K_TURNS; i++) {                                                                    \
        next[i] = fetch(v_first + min((key0) + reader + AT_ONCE * i, tile_end - 1) * v_columns, (d0) + column, DV);          \
    }
// Put what was read where all threads see it.
#define STORE()                                                                                                              \
    _Pragma("unroll") for (int i = 0; i < K_TURNS; i++) {                                                                    \
        *(float4*)&ks[(reader + AT_ONCE * i) * PADDED + column] = next[i];                                                   \
    }

    float acc[TR][OWN];
    float height[TR], total[TR];
#pragma unroll
    for (int i = 0; i < TR; i++) {
        height[i] = LOWEST;
        total[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            acc[i][j] = 0.0f;
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
            STORE()
#pragma unroll
            for (int i = 0; i < Q_TURNS; i++) {
                *(float4*)&qs[(reader + AT_ONCE * i) * PADDED + column] = q_next[i];
            }
            __syncthreads();
            if (d0 + CUT < dk) {
                FETCH_KEYS(key0, d0 + CUT)
            } else {
                FETCH_VALUES(key0, 0)
            }
#pragma unroll
            for (int d = 0; d < CUT; d += 4) {
                float4 b[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    b[j] = four(&ks[(c + 8 * j) * PADDED + d]);
                }
#pragma unroll
                for (int i = 0; i < TR; i++) {
                    float4 a = four(&qs[(r + 16 * i) * PADDED + d]);
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
        float shrink[TR];
#pragma unroll
        for (int i = 0; i < TR; i++) {
            float own = LOWEST;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                unsigned int key = key0 + c + 8 * j;
                s[i][j] *= scale;
                if (cap > 0.0f) {
                    s[i][j] = cap * tanhf(s[i][j] / cap);
                }
                if (key >= begin[i] && key < end[i] && key < tile_end) {
                    own = fmaxf(own, s[i][j]);
                }
            }
            float top = fmaxf(height[i], largest<8>(own));
            shrink[i] = expf(height[i] - top);
            height[i] = top;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                unsigned int key = key0 + c + 8 * j;
                float weight = 0.0f;
                if (key >= begin[i] && key < end[i] && key < tile_end) {
                    weight = expf(s[i][j] - top);
                }
                ps[(r + 16 * i) * (KEYS + 4) + c + 8 * j] = weight;
                sum += weight;
            }
            total[i] = total[i] * shrink[i] + sum_of<8>(sum);
        }
#pragma unroll
        for (int d0 = 0; d0 < DV; d0 += CUT) {
            __syncthreads();
            STORE()
            __syncthreads();
            if (d0 + CUT < DV) {
                FETCH_VALUES(key0, d0 + CUT)
            } else if (key0 + KEYS < tile_end) {
                FETCH_KEYS(key0 + KEYS, 0)
            }
#pragma unroll
            for (int half = 0; half < CUT / 32; half++) {
                float mixed[TR][4];
#pragma unroll
                for (int i = 0; i < TR; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        mixed[i][j] = 0.0f;
                    }
                }
#pragma unroll
                for (int key = 0; key < KEYS; key += 4) {
                    float4 b[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        b[j] = four(&ks[(key + j) * PADDED + 32 * half + 4 * c]);
                    }
#pragma unroll
                    for (int i = 0; i < TR; i++) {
                        float4 a = four(&ps[(r + 16 * i) * (KEYS + 4) + key]);
                        float weights[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            mixed[i][0] += weights[j] * b[j].x;
                            mixed[i][1] += weights[j] * b[j].y;
                            mixed[i][2] += weights[j] * b[j].z;
                            mixed[i][3] += weights[j] * b[j].w;
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < TR; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        acc[i][d0 / 8 + 4 * half + j] = acc[i][d0 / 8 + 4 * half + j] * shrink[i] + mixed[i][j];
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TR; i++) {
        unsigned int m = item.y + r + 16 * i;
        if (m >= rows) {
            continue;
        }
        float factor = 1.0f;
        size_t part_row = ((size_t)blockIdx.x * kv_heads + kv_head) * ROWS + r + 16 * i;
        size_t to = part_row * DV;
        if (direct != 0) {
            factor = 1.0f / total[i];
            to = ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * DV;
        } else if (c == 0) {
            heights[part_row] = make_float2(height[i], total[i]);
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            unsigned int at = j / 4 * 32 + 4 * c + j % 4;
            if (at < DV) {
                result[to + at] = acc[i][j] * factor;
            }
        }
    }
}
