//! dev driver
use gqa2mla::{arch::Architecture, convert::*, observe::*, source::*};
struct P;
impl Observer for P {
    fn event(&self, e: Event) {
        match e {
            Event::Note(n) | Event::Warning(n) => eprintln!("note: {n}"),
            _ => {}
        }
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    if a[1] == "eval" {
        for dir in &a[3..] {
            let t = std::time::Instant::now();
            let w: Vec<Vec<u32>> = serde_json::from_str(&fs_err::read_to_string(&a[2]).unwrap()).unwrap();
            let src = ModelSource::open(dir, &Default::default(), &P).unwrap();
            let arch = Architecture::from_config(&src.config).unwrap();
            let e =
                gqa2mla::verify::perplexity(&gqa2mla::runtime::Model::new(&src, &arch, &gqa2mla::runtime::Cpu), &w, &P)
                    .unwrap();
            println!(
                "{dir}: ppl {:.4} nll {:.4} ({:.1} s)",
                e.perplexity,
                e.nll_nats_per_token,
                t.elapsed().as_secs_f64()
            );
        }
        return;
    }
    let mut s = ConvertSettings { overwrite: true, ..Default::default() };
    let mut i = 3;
    while i < a.len() {
        let v = a.get(i + 1).cloned().unwrap_or_default();
        match a[i].as_str() {
            "-m" => {
                s.method = match v.as_str() {
                    "exact" => Method::Exact,
                    "transmla" => Method::Transmla,
                    "care" => Method::Care,
                    _ => Method::AttentionAware,
                }
            }
            "-r" => s.kv_lora_rank = v.parse().ok(),
            "-R" => s.qk_rope_head_dim = v.parse().ok(),
            "-b" => s.kv_budget = v.parse().ok(),
            "-q" => s.q_lora_rank = v.parse().ok(),
            "-f" => s.freqfold = v.parse().unwrap(),
            "-c" => s.calibration.files.push(v.into()),
            "-n" => s.calibration.samples = v.parse().unwrap(),
            "-d" => s.dtype = Some(if v == "f32" { OutputDtype::F32 } else { OutputDtype::Bf16 }),
            "-g" => s.rope_grid = Some(if v == "stock" { RopeGrid::Stock } else { RopeGrid::Free }),
            "-w" => assert!(s.steps.disable(&v)),
            "-x" => s.refine = v.parse().unwrap(),
            x => panic!("{x}"),
        }
        i += 2;
    }
    let src = ModelSource::open(&a[1], &Default::default(), &P).unwrap_or_else(|e| panic!("{e}"));
    let arch = Architecture::from_config(&src.config).unwrap_or_else(|e| panic!("{e}"));
    match convert(&src, &arch, &s, a[2].as_ref(), &|_| vec![], &P) {
        Ok(r) => {
            for l in &r.layers {
                print!("{:.3}({:.3}) ", l.predicted_error, l.rope_loss);
            }
            println!("\nerr {:.4} rss {:.0} MB {:?}", r.predicted_error, r.peak_rss_bytes as f64 / 1e6, r.seconds);
        }
        Err(e) => {
            eprintln!("error: {e}");
            std::process::exit(2)
        }
    }
}
