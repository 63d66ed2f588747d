//! The report as one page that needs no other file: facts, a table, and a plot of every sample.

use std::fmt::Write;

use crate::report::{Measured, Report};
use crate::stats::Sorted;

/// Pixels of a plot.
const WIDTH: f64 = 760.0;
const ROW: f64 = 34.0;
/// Where the plot's names end and its axis begins.
const LEFT: f64 = 150.0;
const RIGHT: f64 = 20.0;

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let mut body = String::new();
    for (what, fact) in report.facts.lines() {
        // A string takes whatever is written to it.
        let _ = writeln!(body, "<tr><th>{}</th><td>{}</td></tr>", escaped(what), escaped(&fact));
    }
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>hyper bench</title>\n<style>{STYLE}</style></head>\n\
         <body><h1>hyper bench</h1>\n<p>{} runs of each contender, in turn, after {} to warm up. A dot is a sample, a bar the median.</p>\n\
         <table>{body}</table>\n",
        report.runs, report.warm_up
    );
    for measured in &report.measurements {
        page.push_str(&section(measured));
    }
    page.push_str("</body></html>\n");
    page
}

fn section(measured: &Measured) -> String {
    let mut text = format!(
        "<h2>{}</h2>\n{}<table><tr><th></th><th>median, {unit}</th><th>p99</th><th>spread</th><th>runs</th></tr>\n",
        escaped(&measured.name),
        plot(measured),
        unit = measured.unit
    );
    for samples in &measured.contenders {
        let sorted = Sorted::new(&samples.samples);
        let _ = writeln!(
            text,
            "<tr><th>{}</th><td>{:.1}</td><td>{:.1}</td><td>{:.1}</td><td>{}</td></tr>",
            escaped(&samples.contender),
            sorted.median(),
            sorted.quantile(0.99),
            sorted.spread(),
            samples.samples.len()
        );
    }
    text + "</table>\n"
}

/// Every sample on a common axis that begins at 0.
#[expect(clippy::cast_precision_loss, reason = "there are few contenders")]
fn plot(measured: &Measured) -> String {
    let all: Vec<f64> =
        measured.contenders.iter().flat_map(|samples| samples.samples.iter().copied()).collect();
    let most = Sorted::new(&all).quantile(1.0).max(f64::MIN_POSITIVE);
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
    let height = ROW * measured.contenders.len() as f64 + 26.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n"
    );
    for (row, samples) in measured.contenders.iter().enumerate() {
        let y = ROW * (row as f64 + 0.5);
        let name = escaped(&samples.contender);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" class=\"name\">{name}</text>", LEFT - 10.0, y + 4.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" class=\"axis\"/>",
            WIDTH - RIGHT
        );
        for sample in &samples.samples {
            let _ = writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{y}\" r=\"4\"/>", x(*sample));
        }
        let median = x(Sorted::new(&samples.samples).median());
        let _ = writeln!(
            svg,
            "<line x1=\"{median:.1}\" x2=\"{median:.1}\" y1=\"{}\" y2=\"{}\" class=\"median\"/>",
            y - 12.0,
            y + 12.0
        );
    }
    let bottom = height - 8.0;
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{bottom}\">0</text>");
    let end = format!("{most:.1} {}", measured.unit);
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{bottom}\" class=\"name\">{end}</text>", WIDTH - RIGHT);
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:800px;margin:2em auto;padding:0 1em;color:#1c2128}\
table{border-collapse:collapse;margin:.5em 0 1.5em}th{text-align:left;font-weight:500;padding:.15em 1em .15em 0;vertical-align:top}\
td{padding:.15em 1em .15em 0;font-variant-numeric:tabular-nums}h2{font-size:1.1em;margin-top:2em}\
svg text{font-size:12px;fill:#57606a}svg .name{text-anchor:end}svg .axis{stroke:#d0d7de}\
svg circle{fill:#0969da;fill-opacity:.35}svg .median{stroke:#cf222e;stroke-width:3}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Facts;

    #[test]
    fn every_sample_is_a_dot_and_names_are_escaped() {
        let mut report = Report::new(Facts { kernel: "<b>".to_owned(), ..Facts::default() }, 3, 1);
        for ms in [1.0, 2.0, 4.0] {
            report.add("run", "ms", "hyper & co", ms);
        }
        let page = page(&report);
        assert_eq!(page.matches("<circle").count(), 3);
        assert_eq!(page.matches("class=\"median\"").count(), 1);
        assert!(page.contains("hyper &amp; co") && page.contains("&lt;b&gt;") && !page.contains("<b>"));
        assert!(!page.contains("http"), "the page asks nobody for anything");
    }
}
