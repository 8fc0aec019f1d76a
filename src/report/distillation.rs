//! What `distill` did, as text and as a section of the model card.

use super::card::{fenced, inline, short_name};
use super::table::Table;
use super::units;
use crate::distill::DistillReport;

/// For the terminal.
pub fn text(r: &DistillReport, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["output", &r.output.display().to_string()]);
    t.row([
        "trained",
        &format!("{} values ({}) on {} tokens", units::count(r.trained_values as u64), r.settings.train, r.tokens),
    ]);
    t.row(["time", &format!("{}, {:.0} tokens/s", units::seconds(r.seconds), r.tokens as f64 / r.seconds.max(1e-9))]);
    t.row(["kept", &kept(r)]);
    for (i, d) in r.decisions.iter().enumerate() {
        t.row([if i == 0 { "decided" } else { "" }, d]);
    }
    let mut out = t.render(width);
    out.push('\n');
    out += &figures(r).render(width);
    out
}

fn kept(r: &DistillReport) -> String {
    match (r.best_step, r.averaged) {
        (0, _) => "the model that came in: nothing was better on the held-out text".to_owned(),
        (step, true) => format!("the average of the weights up to step {step} of {}", r.curve.len()),
        (step, false) => format!("the weights after step {step} of {}", r.curve.len()),
    }
}

/// Held-out loss by text.
fn figures(r: &DistillReport) -> Table {
    let mut t = Table::new(&["held-out text", ">tokens", ">KL before", ">KL after", ">left"]);
    let row = |name: &str, tokens: usize, before: f64, after: f64| {
        [
            name.to_owned(),
            tokens.to_string(),
            units::figure(before),
            units::figure(after),
            units::percent(if before > 0.0 { after / before } else { 1.0 }),
        ]
    };
    for text in &r.texts {
        t.row(row(&text.name, text.held_out_tokens, text.kl_before, text.kl_after));
    }
    if r.texts.len() > 1 {
        let all = r.texts.iter().map(|text| text.held_out_tokens).sum();
        t.row(row("all", all, r.kl_before, r.kl_after));
    }
    t
}

/// `README.md` of a distilled folder: the student's with a section more.
pub fn card(student: Option<&str>, r: &DistillReport, command: &str) -> String {
    let mut out = student.map_or_else(|| format!("# {}\n", inline(short_name(&r.student))), str::to_owned);
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out += &format!(
        "\n## Distilled\n\nAfter its conversion the model was trained by `gqa2mla` {} to predict what `{}` predicts: {} tokens, \
         loss KL(source || model) over the whole vocabulary, trained: {}. Windows that were never trained on chose what was \
         kept: {}. KL on them, in nats per token:\n\n",
        inline(&r.tool_version),
        inline(short_name(&r.source)),
        r.tokens,
        r.settings.train,
        kept(r),
    );
    out += &figures(r).markdown();
    out += &format!("\n\n```sh\n{}\n```\n\n", fenced(command));
    for d in &r.decisions {
        out += &format!("- {}\n", inline(d));
    }
    out += "\n`distill.json` holds the curve; `conversion.json` is about the conversion before it.\n";
    out
}
