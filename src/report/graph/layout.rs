//! Where each node of a drawing is: columns from the wire to the disk, few crossings, straight long edges.
//!
//! Sugiyama's way, in its plainest form: layers, places for edges that pass a layer, some sweeps that put each
//! node at the middle of its neighbours, and then heights with room between them. Nothing in it is by chance.

use std::collections::BTreeMap;

use super::Graph;

/// Sweeps over the layers; more change nothing that one could see.
const SWEEPS: usize = 12;
/// Height of a node's place, and of an edge's that only passes by.
const NODE_HEIGHT: f64 = 54.0;
const PASS_HEIGHT: f64 = 18.0;

/// A node, or (with `None`) an edge's place in a layer that it passes.
struct Place<'a> {
    node: Option<&'a str>,
    layer: usize,
    before: Vec<usize>,
    after: Vec<usize>,
    y: f64,
}

impl Place<'_> {
    fn height(&self) -> f64 {
        if self.node.is_some() { NODE_HEIGHT } else { PASS_HEIGHT }
    }
}

/// From where to where, and the layers and heights that it goes through.
pub type Route<'a> = (&'a str, &'a str, Vec<(usize, f64)>);

pub struct Layout<'a> {
    /// The layer and the middle's height of each node.
    pub nodes: BTreeMap<&'a str, (usize, f64)>,
    pub edges: Vec<Route<'a>>,
    pub layers: usize,
    pub height: f64,
}

pub fn layout(graph: &Graph) -> Layout<'_> {
    let layers = layers(graph);
    let mut places: Vec<Place> = Vec::new();
    let mut index: BTreeMap<&str, usize> = BTreeMap::new();
    for (id, layer) in &layers {
        index.insert(*id, places.len());
        places.push(Place { node: Some(*id), layer: *layer, before: vec![], after: vec![], y: 0.0 });
    }
    let mut routes = Vec::new();
    for (from, to) in &graph.edges {
        let (start, end) = (index[from.as_str()], index[to.as_str()]);
        let mut route = vec![start];
        for layer in places[start].layer + 1..places[end].layer {
            route.push(places.len());
            places.push(Place { node: None, layer, before: vec![], after: vec![], y: 0.0 });
        }
        route.push(end);
        for pair in route.windows(2) {
            places[pair[0]].after.push(pair[1]);
            places[pair[1]].before.push(pair[0]);
        }
        routes.push((from.as_str(), to.as_str(), route));
    }
    let count = layers.values().max().map_or(0, |last| last + 1);
    let mut columns: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (place, facts) in places.iter().enumerate() {
        columns[facts.layer].push(place);
    }
    for column in &columns {
        stack(&mut places, column);
    }
    for sweep in 0..SWEEPS {
        let forth = sweep % 2 == 0;
        let order: Vec<usize> = if forth { (0..count).collect() } else { (0..count).rev().collect() };
        for layer in order {
            settle(&mut places, &mut columns[layer], forth);
        }
    }
    let top = places.iter().map(|place| place.y - place.height() / 2.0).fold(f64::INFINITY, f64::min);
    let bottom = places.iter().map(|place| place.y + place.height() / 2.0).fold(0.0, f64::max);
    let top = if top.is_finite() { top } else { 0.0 };
    // Whole numbers: a drawing that differs in the last digit would be another one.
    let at = |place: usize| (places[place].layer, (places[place].y - top).round());
    let drawn = |(from, to, route): (_, _, Vec<usize>)| (from, to, route.into_iter().map(at).collect());
    Layout {
        nodes: index.iter().map(|(id, place)| (*id, at(*place))).collect(),
        edges: routes.into_iter().map(drawn).collect(),
        layers: count,
        height: (bottom - top).max(0.0).round(),
    }
}

/// At least the column of its kind, and right of all that leads to it. Columns that nothing is in go.
fn layers(graph: &Graph) -> BTreeMap<&str, usize> {
    let mut layers: BTreeMap<&str, usize> =
        graph.nodes.iter().map(|(id, node)| (id.as_str(), node.kind as usize)).collect();
    // A path has no more edges than there are nodes; a circle (which the kernel refuses) ends there, too.
    for _ in 0..graph.nodes.len() {
        let mut moved = false;
        for (from, to) in &graph.edges {
            let least = layers[from.as_str()] + 1;
            if layers[to.as_str()] < least && least < graph.nodes.len() + 8 {
                layers.insert(to, least);
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    let mut used: Vec<usize> = layers.values().copied().collect();
    used.sort_unstable();
    used.dedup();
    for layer in layers.values_mut() {
        *layer = used.binary_search(layer).unwrap_or(0);
    }
    layers
}

/// One below the other, as they are ordered.
fn stack(places: &mut [Place], column: &[usize]) {
    let mut y = 0.0;
    for &place in column {
        let height = places[place].height();
        places[place].y = y + height / 2.0;
        y += height;
    }
}

/// Orders a layer by the middle of its neighbours in the layer before (or after), and gives each place the
/// height that is nearest to that and free.
fn settle(places: &mut [Place], column: &mut [usize], forth: bool) {
    let wanted: BTreeMap<usize, f64> = column
        .iter()
        .map(|&place| {
            let facts = &places[place];
            let neighbours = if forth { &facts.before } else { &facts.after };
            let sum: f64 = neighbours.iter().map(|&other| places[other].y).sum();
            let middle = if neighbours.is_empty() { facts.y } else { sum / neighbours.len() as f64 };
            (place, middle)
        })
        .collect();
    column.sort_by(|a, b| wanted[a].total_cmp(&wanted[b]).then(a.cmp(b)));
    // Blocks of places that touch, each as near as can be to where its places want to be: whenever a block
    // would overlap the one above, the two become one.
    let mut blocks: Vec<(f64, f64, Vec<usize>)> = Vec::new();
    for &place in column.iter() {
        let height = places[place].height();
        let mut block = (wanted[&place] - height / 2.0, height, vec![place]);
        while let Some((top, tall, members)) = blocks.pop() {
            if top + tall <= block.0 {
                blocks.push((top, tall, members));
                break;
            }
            let (a, b) = (members.len() as f64, block.2.len() as f64);
            let top = (top * a + (block.0 - tall) * b) / (a + b);
            block = (top, tall + block.1, members.into_iter().chain(block.2).collect());
        }
        blocks.push(block);
    }
    for (mut top, _, members) in blocks {
        for place in members {
            let height = places[place].height();
            places[place].y = top + height / 2.0;
            top += height;
        }
    }
}
