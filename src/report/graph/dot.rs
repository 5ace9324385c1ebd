//! The graph in the language of Graphviz.

use super::Graph;

pub fn text(graph: &Graph) -> String {
    let mut out = String::from(
        "digraph vmctl {\n  rankdir=LR;\n  node [shape=box, style=\"rounded,filled\", fontname=\"sans-serif\", fontsize=11];\n  edge [color=\"#78909c\", arrowsize=0.7];\n",
    );
    for (id, node) in &graph.nodes {
        let (fill, line) = node.kind.colours();
        let style = if node.off { ", style=\"rounded,filled,dashed\"" } else { "" };
        out.push_str(&format!(
            "  {} [label={}, tooltip={}, fillcolor=\"{fill}\", color=\"{line}\"{style}];\n",
            quoted(id),
            quoted(&format!("{}\n{}", node.name, node.kind.word())),
            quoted(&tooltip(id, &node.details)),
        ));
    }
    for (from, to) in &graph.edges {
        out.push_str(&format!("  {} -> {};\n", quoted(from), quoted(to)));
    }
    out.push_str("}\n");
    out
}

pub fn tooltip(id: &str, details: &[String]) -> String {
    std::iter::once(id).chain(details.iter().map(String::as_str)).collect::<Vec<_>>().join("\n")
}

/// A string of the language: a quote and a backslash are escaped, a new line is `\n`.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
