//! The dependency graph: what must be there before what, and the cycles that make that impossible.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;

use super::Problem;
use crate::kinds::{Spec, link_of};
use crate::name::{LinkName, ObjectId};

/// For each object, those that must be there first. Only declared ones.
pub fn dependencies(objects: &BTreeMap<ObjectId, Spec>) -> BTreeMap<ObjectId, BTreeSet<ObjectId>> {
    let links: BTreeMap<LinkName, &ObjectId> =
        objects.iter().filter_map(|(id, spec)| Some((link_of(id, spec, objects)?, id))).collect();
    objects
        .iter()
        .map(|(id, spec)| {
            let mut needs: BTreeSet<ObjectId> = spec
                .references()
                .into_iter()
                .map(|reference| reference.to)
                .filter(|to| objects.contains_key(to))
                .collect();
            match spec {
                Spec::Vlan(vlan) => needs.extend(links.get(&vlan.parent).map(|id| (*id).clone())),
                Spec::Bridge(bridge) => {
                    let owners = bridge.ports.iter().filter_map(|port| links.get(&port.interface));
                    needs.extend(owners.map(|id| (*id).clone()));
                }
                Spec::Network(network) => needs.extend(network.declared_bridge(objects)),
                _ => {}
            }
            (id.clone(), needs)
        })
        .collect()
}

/// Dependencies first; else by kind and name, so that the same manifests always give the same order.
pub fn order(dependencies: &BTreeMap<ObjectId, BTreeSet<ObjectId>>) -> Result<Vec<ObjectId>, Vec<Problem>> {
    let mut graph = DiGraphMap::<&ObjectId, ()>::new();
    for (id, needs) in dependencies {
        graph.add_node(id);
        for need in needs {
            graph.add_edge(id, need, ());
        }
    }
    let cycles: Vec<Problem> = tarjan_scc(&graph)
        .into_iter()
        .filter(|component| component.len() > 1 || graph.contains_edge(component[0], component[0]))
        .map(|component| cycle_problem(dependencies, component.into_iter().min()))
        .collect();
    if !cycles.is_empty() {
        return Err(cycles);
    }

    let mut waiting: BTreeMap<&ObjectId, usize> =
        dependencies.iter().map(|(id, needs)| (id, needs.len())).collect();
    let mut ready: BTreeSet<&ObjectId> =
        waiting.iter().filter(|(_, count)| **count == 0).map(|(id, _)| *id).collect();
    let mut order = Vec::with_capacity(dependencies.len());
    while let Some(id) = ready.pop_first() {
        order.push(id.clone());
        for dependent in graph.neighbors_directed(id, petgraph::Direction::Incoming) {
            if let Some(count) = waiting.get_mut(dependent) {
                *count -= 1;
                if *count == 0 {
                    ready.insert(dependent);
                }
            }
        }
    }
    Ok(order)
}

/// Names the whole cycle, beginning with its first object.
fn cycle_problem(dependencies: &BTreeMap<ObjectId, BTreeSet<ObjectId>>, start: Option<&ObjectId>) -> Problem {
    let start = start.expect("a strongly connected component has a member");
    let path = shortest_cycle(dependencies, start);
    let names: Vec<String> = path.iter().chain([&start]).map(ToString::to_string).collect();
    let mut problem = Problem::new(
        start,
        "",
        format!("these objects depend on one another in a circle: {}", names.join(" → ")),
    )
    .hint("remove one of these references");
    for id in path.iter().skip(1) {
        problem = problem.related(id, "", "part of the circle");
    }
    problem
}

/// Breadth first from `start` back to itself.
fn shortest_cycle<'a>(
    dependencies: &'a BTreeMap<ObjectId, BTreeSet<ObjectId>>,
    start: &'a ObjectId,
) -> Vec<&'a ObjectId> {
    let mut came_from: BTreeMap<&ObjectId, &ObjectId> = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([start]);
    while let Some(id) = queue.pop_front() {
        for need in dependencies.get(id).into_iter().flatten() {
            if need == start {
                let mut path = vec![id];
                let mut at = id;
                while at != start {
                    at = came_from[at];
                    path.push(at);
                }
                path.reverse();
                return path;
            }
            came_from.entry(need).or_insert_with(|| {
                queue.push_back(need);
                id
            });
        }
    }
    vec![start]
}
