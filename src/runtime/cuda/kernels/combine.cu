// Set from outside: DV, the width of a value, and ROWS, the rows of a tile.

// Put the results of the runs of a span's keys together, in order: a block of 128 per tile, row and KV head.
// Tiles hold: span, first row, first item, items.
extern "C" __global__ void combine(const uint4* spans, const uint4* tiles, const float* parts, const float2* heights,
                                   float* result, unsigned int group, unsigned int kv_heads) {
    // Highest scores, then weights and weighted sums, of 128 items at a time.
    __shared__ float tops[128];
    __shared__ float weights[128];
    __shared__ float sums[128];
    uint4 tile = tiles[blockIdx.x];
    uint4 span = spans[tile.x];
    unsigned int r = blockIdx.y;
    unsigned int kv_head = blockIdx.z;
    unsigned int t = threadIdx.x;
    unsigned int m = tile.y + r;
    if (m >= span.y * group) {
        return;
    }
    size_t first = ((size_t)tile.z * kv_heads + kv_head) * ROWS + r;
    size_t step = (size_t)kv_heads * ROWS;
    float own = LOWEST;
    for (unsigned int i = t; i < tile.w; i += 128) {
        own = fmaxf(own, heights[first + i * step].x);
    }
    tops[t] = own;
    __syncthreads();
    float top = LOWEST;
    for (unsigned int i = 0; i < min(tile.w, 128u); i++) {
        top = fmaxf(top, tops[i]);
    }
    const unsigned int OWN_COLUMNS = (DV + 127) / 128;
    float sum[OWN_COLUMNS];
    float total = 0.0f;
    for (unsigned int j = 0; j < OWN_COLUMNS; j++) {
        sum[j] = 0.0f;
    }
    for (unsigned int i0 = 0; i0 < tile.w; i0 += 128) {
        __syncthreads();
        if (i0 + t < tile.w) {
            float2 height = heights[first + (i0 + t) * step];
            float weight = expf(height.x - top);
            weights[t] = weight;
            sums[t] = weight * height.y;
        }
        __syncthreads();
#pragma unroll 8
        for (unsigned int i = 0; i < min(tile.w - i0, 128u); i++) {
            const float* part = parts + (first + (i0 + i) * step) * DV;
            total += sums[i];
#pragma unroll
            for (unsigned int j = 0; j < OWN_COLUMNS; j++) {
                if (t + 128 * j < DV) {
                    sum[j] += weights[i] * part[t + 128 * j];
                }
            }
        }
    }
    size_t to = ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * DV;
    for (unsigned int j = 0; j < OWN_COLUMNS; j++) {
        if (t + 128 * j < DV) {
            result[to + t + 128 * j] = sum[j] / total;
        }
    }
}
