// Turn pairs of columns of every head in place; a thread per pair.

struct Params {
    rows: u32, columns: u32, heads: u32, pairs: u32,
    start: u32, stride: u32, interleaved: u32, first_row: u32,
    first_position: u32, across: u32, unused1: u32, unused2: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * p.across + group.x) * 128u + t;
    if (i >= p.rows * p.heads * p.pairs) {
        return;
    }
    let pair = i % p.pairs;
    let head = (i / p.pairs) % p.heads;
    let row = i / (p.pairs * p.heads);
    let angle = angles[(positions[p.first_row + row] - p.first_position) * p.pairs + pair];
    let base = row * p.columns + p.start + head * p.stride;
    var left = base + pair;
    var right = left + p.pairs;
    if (p.interleaved != 0u) {
        left = base + 2u * pair;
        right = left + 1u;
    }
    let a = x[left];
    let b = x[right];
    x[left] = a * angle.x - b * angle.y;
    x[right] = b * angle.x + a * angle.y;
}
