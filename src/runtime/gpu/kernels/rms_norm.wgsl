// y = x / sqrt(mean(x^2) + eps) * gain, a workgroup per row.

struct Params { rows: u32, columns: u32, eps: f32, across: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> gain: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

const THREADS = 128u;
var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.y * p.across + group.x;
    let first = min(row, p.rows - 1u) * p.columns;
    var sum = 0.0;
    for (var c = t; c < p.columns; c += THREADS) {
        let value = x[first + c];
        sum += value * value;
    }
    sums[t] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            sums[t] += sums[t + half];
        }
    }
    workgroupBarrier();
    // Not inverseSqrt, which may be two bits short.
    let factor = 1.0 / sqrt(sums[0] / f32(p.columns) + p.eps);
    if (row < p.rows) {
        for (var c = t; c < p.columns; c += THREADS) {
            y[first + c] = x[first + c] * factor * gain[c];
        }
    }
}
