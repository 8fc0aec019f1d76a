// Put the results of the runs of a span's keys together, in order. Set from outside: DV.

struct Params { group: u32, kv_heads: u32, q_first: u32, tiles: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> spans: array<vec4<u32>>;
// Per tile: span, first row, first item, items.
@group(0) @binding(2) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> parts: array<f32>;
@group(0) @binding(4) var<storage, read> heights: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> result: array<f32>;

const ROWS = 16u;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let tile = tiles[wg.x];
    let span = spans[tile.x];
    let kv_head = wg.z;
    let r = wg.y;
    let m = tile.y + r;
    if (m >= span.y * p.group) {
        return;
    }
    var top = -3.0e38;
    for (var i = 0u; i < tile.w; i++) {
        top = max(top, heights[((tile.z + i) * p.kv_heads + kv_head) * ROWS + r].x);
    }
    let head = kv_head * p.group + m % p.group;
    let to = ((span.x - p.q_first + m / p.group) * p.kv_heads * p.group + head) * DV;
    for (var column = t; column < DV; column += 128u) {
        var sum = 0.0;
        var total = 0.0;
        for (var i = 0u; i < tile.w; i++) {
            let part = ((tile.z + i) * p.kv_heads + kv_head) * ROWS + r;
            let weight = exp(heights[part].x - top);
            total += weight * heights[part].y;
            sum += weight * parts[part * DV + column];
        }
        result[to + column] = sum / total;
    }
}
