//! The graph as a drawing for browsers, with no other program.

use super::dot::tooltip;
use super::layout::layout;
use super::{Graph, Node};

const MARGIN: f64 = 24.0;
const NODE_HEIGHT: f64 = 38.0;
const NODE_WIDTH_MIN: f64 = 76.0;
/// Between columns; edges bend here.
const GAP: f64 = 64.0;
/// A name's letter at most, in the drawing's type.
const LETTER: f64 = 7.3;

pub fn text(graph: &Graph) -> String {
    let layout = layout(graph);
    let mut widths = vec![NODE_WIDTH_MIN; layout.layers];
    for (id, (layer, _)) in &layout.nodes {
        let width = graph.nodes[*id].name.chars().count() as f64 * LETTER + 20.0;
        widths[*layer] = widths[*layer].max(width.ceil());
    }
    let mut left = MARGIN;
    let lefts: Vec<f64> = widths
        .iter()
        .map(|width| {
            let here = left;
            left += width + GAP;
            here
        })
        .collect();
    let width = (left - GAP + MARGIN).max(2.0 * MARGIN);
    let height = layout.height + 2.0 * MARGIN;
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"ui-monospace, monospace\" font-size=\"12\">\n\
         <title>vmctl: {} objects</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <g class=\"edges\" fill=\"none\" stroke=\"#78909c\" stroke-width=\"1.4\">\n",
        graph.nodes.len()
    );
    for (from, to, route) in &layout.edges {
        let mut path = String::new();
        let mut last = (0.0, 0.0);
        for (place, (layer, y)) in route.iter().enumerate() {
            let (is_first, is_last) = (place == 0, place + 1 == route.len());
            let (enter, leave) = (lefts[*layer], lefts[*layer] + widths[*layer]);
            let y = y + MARGIN;
            if is_first {
                path.push_str(&format!("M{leave} {y}"));
            } else {
                let middle = ((last.0 + enter) / 2.0).round();
                path.push_str(&format!("C{middle} {} {middle} {y} {enter} {y}", last.1));
                if !is_last {
                    path.push_str(&format!("H{leave}"));
                }
            }
            last = (leave, y);
        }
        out.push_str(&format!(
            "<path class=\"edge\" d=\"{path}\"><title>{} → {}</title></path>\n",
            escaped(from),
            escaped(to)
        ));
    }
    out.push_str("</g>\n");
    for (id, (layer, y)) in &layout.nodes {
        node(&mut out, id, &graph.nodes[*id], (lefts[*layer], y + MARGIN, widths[*layer]));
    }
    out.push_str("</svg>\n");
    out
}

fn node(out: &mut String, id: &str, node: &Node, (x, y, width): (f64, f64, f64)) {
    let (fill, line) = node.kind.colours();
    let dashes = if node.off { " stroke-dasharray=\"4 3\"" } else { "" };
    let (top, middle) = (y - NODE_HEIGHT / 2.0, x + width / 2.0);
    out.push_str(&format!(
        "<g class=\"node {}\" data-id=\"{id}\"><title>{}</title>\
         <rect x=\"{x}\" y=\"{top}\" width=\"{width}\" height=\"{NODE_HEIGHT}\" rx=\"5\" fill=\"{fill}\" stroke=\"{line}\"{dashes}/>\
         <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
         <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\" font-size=\"9\" fill=\"{line}\">{}</text></g>\n",
        node.kind.word().to_lowercase(),
        escaped(&tooltip(id, &node.details)),
        y,
        escaped(&node.name),
        y + 12.0,
        node.kind.word(),
        id = escaped(id),
    ));
}

/// What XML gives a meaning to, and what it doesn't allow at all.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
