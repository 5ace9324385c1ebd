//! nftables tables of ours as values, and the least that must be written to make one what it shall be.
//! Pure: who runs `nft` is `linux/nftables.rs`.
//!
//! A rule's expressions are kept in nftables' own JSON, spelled as `nft` prints it, so that what is read
//! back can be compared with what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::name::{Kind, Mark, NameError, ObjectId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Frames, before and between ports of bridges.
    Bridge,
}

impl Family {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        }
    }
}

/// A table's family and name. The name says whose it is (`vmctl.<set>.<network>`: labels hold no dots), for
/// a table can't be marked otherwise in a way that every `nft` prints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableId {
    pub family: Family,
    pub owner: Mark,
}

impl TableId {
    pub fn of_network(mark: &Mark) -> Self {
        Self { family: Family::Inet, owner: mark.clone() }
    }

    /// Of what its guests may say that they are.
    pub fn of_guards(mark: &Mark) -> Self {
        Self { family: Family::Bridge, owner: mark.clone() }
    }

    pub fn name(&self) -> String {
        format!("vmctl.{}.{}", self.owner.set, self.owner.owner.name)
    }

    /// `None`: not one of ours.
    pub fn parse(family: &str, name: &str) -> Option<Self> {
        let (set, object) = name.strip_prefix("vmctl.")?.split_once('.')?;
        let owner = ObjectId::new(Kind::Network, object.parse().ok()?);
        let family = [Family::Inet, Family::Bridge].into_iter().find(|known| known.as_str() == family)?;
        Some(Self { family, owner: Mark::new(set.parse().ok()?, owner) })
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family.as_str(), self.name())
    }
}

impl FromStr for TableId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let id = text.split_once(' ').and_then(|(family, name)| Self::parse(family, name));
        id.ok_or_else(|| NameError(format!("`{text}` is not a table of vmctl's")))
    }
}

impl TryFrom<String> for TableId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<TableId> for String {
    fn from(id: TableId) -> String {
        id.to_string()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub chains: BTreeMap<String, Chain>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sets: BTreeMap<String, Set>,
    /// What else is in it (`set x`): none of it is ours.
    #[serde(default)]
    pub others: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// `None`: only others jump to it.
    pub base: Option<BaseChain>,
    pub rules: Vec<Rule>,
}

/// Where a chain is hooked in. Its policy is `accept`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseChain {
    #[serde(rename = "type")]
    pub kind: String,
    pub hook: String,
    #[serde(rename = "prio")]
    pub priority: i64,
    pub policy: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What it is for; shown to people, and no key.
    pub comment: String,
    pub expr: Vec<Value>,
}

/// A named set or map, whose elements come and go one by one. Rules call it `@name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// What its elements, or a map's keys, are: `ipv4_addr`, `ifname`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What a map gives: `verdict`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// A map's values by their keys; of a set, nothing by its elements.
    pub elements: BTreeMap<String, Value>,
}

impl Set {
    pub fn new(kind: &str, elements: impl IntoIterator<Item = String>) -> Self {
        let elements = elements.into_iter().map(|element| (element, Value::Null)).collect();
        Self { kind: kind.to_owned(), map: None, elements }
    }

    /// From what `nft` prints of it. `None`: it has something that ours never have, such as a timeout.
    fn parse(set: &Value) -> Option<Self> {
        let known = ["family", "name", "table", "handle", "type", "map", "elem"];
        if !set.as_object()?.keys().all(|key| known.contains(&key.as_str())) {
            return None;
        }
        let element = |element: &Value| match element {
            Value::String(key) => Some((key.clone(), Value::Null)),
            Value::Array(pair) => match &pair[..] {
                [Value::String(key), value] => Some((key.clone(), value.clone())),
                _ => None,
            },
            _ => None,
        };
        let elements = set.get("elem").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        Some(Self {
            kind: set.get("type")?.as_str()?.to_owned(),
            map: set.get("map").and_then(Value::as_str).map(str::to_owned),
            elements: elements.iter().map(element).collect::<Option<_>>()?,
        })
    }

    fn word(&self) -> &'static str {
        if self.map.is_some() { "map" } else { "set" }
    }

    /// What it is, whatever is in it.
    pub fn describe(&self) -> String {
        match &self.map {
            Some(value) => format!("map {} : {value}", self.kind),
            None => format!("set {}", self.kind),
        }
    }
}

/// Sets have no order: theirs is that of their text, whoever wrote them. One of a single element is printed as that.
pub fn normalise(expression: &mut Value) {
    match expression {
        Value::Object(object) => {
            object.values_mut().for_each(normalise);
            if let Some(Value::Array(set)) = object.get_mut("set") {
                set.sort_by_key(Value::to_string);
                if let [element] = &set[..]
                    && !element.is_array()
                {
                    *expression = element.clone();
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(normalise),
        _ => {}
    }
}

/// A table as it is in the kernel: its rules have handles, in the chains' order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    pub table: Table,
    pub handles: BTreeMap<String, Vec<u64>>,
}

impl Listed {
    /// From the objects that `nft -j list table` prints.
    pub fn parse(objects: &[Value]) -> Result<Self, String> {
        let mut listed = Self::default();
        for object in objects {
            let Some((kind, value)) = object.as_object().and_then(|object| object.iter().next()) else {
                return Err(format!("`{object}` is no object of nftables"));
            };
            let text = |field: &str| {
                let text = value.get(field).and_then(Value::as_str);
                text.map(str::to_owned).ok_or_else(|| format!("a {kind} without `{field}`"))
            };
            match kind.as_str() {
                "metainfo" | "table" => {}
                "chain" => {
                    let base = match value.get("hook") {
                        Some(_) => Some(BaseChain::deserialize(value).map_err(|error| error.to_string())?),
                        None => None,
                    };
                    listed.table.chains.insert(text("name")?, Chain { base, rules: Vec::new() });
                    listed.handles.insert(text("name")?, Vec::new());
                }
                "rule" => {
                    let name = text("chain")?;
                    let chain = listed.table.chains.get_mut(&name);
                    let chain = chain.ok_or_else(|| format!("a rule of the unknown chain {name}"))?;
                    let comment = text("comment").unwrap_or_default();
                    let mut expr = value.get("expr").and_then(Value::as_array).cloned().unwrap_or_default();
                    expr.iter_mut().for_each(normalise);
                    chain.rules.push(Rule { comment, expr });
                    let handle = value.get("handle").and_then(Value::as_u64);
                    let handle = handle.ok_or_else(|| "a rule without `handle`".to_owned())?;
                    listed.handles.entry(name).or_default().push(handle);
                }
                "set" | "map" if let Some(set) = Set::parse(value) => {
                    listed.table.sets.insert(text("name")?, set);
                }
                other => {
                    listed.table.others.insert(format!("{other} {}", text("name").unwrap_or_default()));
                }
            }
        }
        Ok(listed)
    }
}

/// The commands that make a table what it shall be; run in one transaction. Rules that stay are not touched:
/// neither they nor the connections that they judge notice anything.
pub fn transaction(id: &TableId, have: Option<&Listed>, want: &Table) -> Vec<Value> {
    let mut commands = Commands { family: id.family.as_str(), table: id.name(), list: Vec::new() };
    let nothing = Listed::default();
    let have = match have {
        // What isn't ours may use, or be used by, anything in it: begin anew.
        Some(have) if !have.table.others.is_empty() || changes_a_sets_kind(&have.table, want) => {
            commands.table("delete");
            commands.table("add");
            &nothing
        }
        Some(have) => have,
        None => {
            commands.table("add");
            &nothing
        }
    };
    let suits = |name: &String| {
        let (have, want) = (have.table.chains.get(name), want.chains.get(name));
        have.zip(want).is_some_and(|(have, want)| hooked_alike(&have.base, &want.base))
    };
    // A chain that is hooked in elsewhere is made anew; nothing jumps to one.
    let stays = |name: &&String| want.chains.contains_key(*name);
    for name in have.table.chains.keys().filter(stays).filter(|name| !suits(name)) {
        commands.chain("flush", name, None);
        commands.chain("delete", name, None);
    }
    // Chains before the rules that jump to them, and away with them after.
    for (name, chain) in &want.chains {
        let is_as_it_was = have.table.chains.get(name).is_some_and(|have| have.base == chain.base);
        if !is_as_it_was {
            // (Of one that is there this changes the policy.)
            commands.chain("add", name, chain.base.as_ref());
        }
    }
    // Elements lead to chains, and rules look into sets.
    for (name, set) in &want.sets {
        let have = have.table.sets.get(name);
        if have.is_none() {
            commands.set("add", name, set);
        }
        let none = BTreeMap::new();
        let had = have.map_or(&none, |have| &have.elements);
        let differing = |one: &BTreeMap<String, Value>, other: &BTreeMap<String, Value>| {
            let differs = |(key, value): &(&String, &Value)| other.get(*key) != Some(*value);
            let pair = |(key, value): (&String, &Value)| (key.clone(), value.clone());
            one.iter().filter(differs).map(pair).collect()
        };
        commands.elements("delete", name, differing(had, &set.elements));
        commands.elements("add", name, differing(&set.elements, had));
    }
    for (name, chain) in &want.chains {
        let (rules, handles) = match have.table.chains.get(name).filter(|_| suits(name)) {
            Some(have_chain) => (&have_chain.rules[..], &have.handles[name][..]),
            None => (&[][..], &[][..]),
        };
        commands.rules(name, rules, handles, &chain.rules);
    }
    let gone: Vec<&String> = have.table.chains.keys().filter(|name| !stays(name)).collect();
    gone.iter().for_each(|name| commands.chain("flush", name, None));
    for (name, set) in have.table.sets.iter().filter(|(name, _)| !want.sets.contains_key(*name)) {
        commands.set("delete", name, set);
    }
    gone.iter().for_each(|name| commands.chain("delete", name, None));
    commands.list
}

fn changes_a_sets_kind(have: &Table, want: &Table) -> bool {
    want.sets
        .iter()
        .any(|(name, set)| have.sets.get(name).is_some_and(|have| have.describe() != set.describe()))
}

/// But for the policy.
fn hooked_alike(have: &Option<BaseChain>, want: &Option<BaseChain>) -> bool {
    let place = |base: &BaseChain| (base.kind.clone(), base.hook.clone(), base.priority);
    have.as_ref().map(place) == want.as_ref().map(place)
}

struct Commands {
    family: &'static str,
    table: String,
    list: Vec<Value>,
}

impl Commands {
    fn table(&mut self, verb: &str) {
        self.list.push(json!({verb: {"table": {"family": self.family, "name": self.table}}}));
    }

    fn chain(&mut self, verb: &str, name: &str, base: Option<&BaseChain>) {
        let mut chain = json!({"family": self.family, "table": self.table, "name": name});
        if let (Some(base), Some(chain)) = (base, chain.as_object_mut()) {
            chain.insert("type".into(), json!(base.kind));
            chain.insert("hook".into(), json!(base.hook));
            chain.insert("prio".into(), json!(base.priority));
            chain.insert("policy".into(), json!(base.policy));
        }
        self.list.push(json!({verb: {"chain": chain}}));
    }

    fn set(&mut self, verb: &str, name: &str, set: &Set) {
        let mut body = json!({"family": self.family, "table": self.table, "name": name, "type": set.kind});
        if let Some(map) = &set.map {
            body["map"] = json!(map);
        }
        self.list.push(json!({verb: {set.word(): body}}));
    }

    fn elements(&mut self, verb: &str, set: &str, elements: Vec<(String, Value)>) {
        if elements.is_empty() {
            return;
        }
        let element = |(key, value)| match value {
            Value::Null => json!(key),
            value => json!([key, value]),
        };
        let elements: Vec<Value> = elements.into_iter().map(element).collect();
        let body = json!({"family": self.family, "table": self.table, "name": set, "elem": elements});
        self.list.push(json!({verb: {"element": body}}));
    }

    /// The longest common run of rules stays; the others go by their handles, or come beside what stays.
    fn rules(&mut self, chain: &str, have: &[Rule], handles: &[u64], want: &[Rule]) {
        let stays = common(have, want);
        for (index, handle) in handles.iter().enumerate() {
            if !stays.iter().any(|(kept, _)| *kept == index) {
                let rule =
                    json!({"family": self.family, "table": self.table, "chain": chain, "handle": handle});
                self.list.push(json!({"delete": {"rule": rule}}));
            }
        }
        for (index, rule) in want.iter().enumerate() {
            if stays.iter().any(|(_, kept)| *kept == index) {
                continue;
            }
            let mut new = json!({"family": self.family, "table": self.table, "chain": chain,
                                 "comment": rule.comment, "expr": rule.expr});
            // Before the next one that stays: several in a row keep their order so.
            match stays.iter().find(|(_, kept)| *kept > index) {
                Some((before, _)) => {
                    new["handle"] = json!(handles[*before]);
                    self.list.push(json!({"insert": {"rule": new}}));
                }
                None => self.list.push(json!({"add": {"rule": new}})),
            }
        }
    }
}

/// The longest common subsequence, as pairs of indexes. (Lists of rules are short.)
fn common(have: &[Rule], want: &[Rule]) -> Vec<(usize, usize)> {
    let mut longest = vec![vec![0usize; want.len() + 1]; have.len() + 1];
    for i in (0..have.len()).rev() {
        for j in (0..want.len()).rev() {
            longest[i][j] = if have[i] == want[j] {
                longest[i + 1][j + 1] + 1
            } else {
                longest[i + 1][j].max(longest[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut pairs) = (0, 0, Vec::new());
    while i < have.len() && j < want.len() {
        if have[i] == want[j] {
            pairs.push((i, j));
            (i, j) = (i + 1, j + 1);
        } else if longest[i + 1][j] >= longest[i][j + 1] {
            i += 1;
        } else {
            j += 1;
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        Rule { comment: text.to_owned(), expr: vec![json!({"accept": null})] }
    }

    fn id() -> TableId {
        "inet vmctl.default.web".parse().unwrap()
    }

    fn table(rules: &[&str]) -> Table {
        let rules = rules.iter().map(|text| rule(text)).collect();
        Table { chains: [("forward".to_owned(), Chain { base: None, rules })].into(), ..Table::default() }
    }

    fn listed(rules: &[&str]) -> Listed {
        let handles = (1..=rules.len() as u64).map(|number| number * 10).collect();
        Listed { table: table(rules), handles: [("forward".to_owned(), handles)].into() }
    }

    /// What the commands do, in short: `-20` deletes a rule, `b<30` inserts one, `c` adds one at the end.
    fn short(have: &[&str], want: &[&str]) -> String {
        let commands = transaction(&id(), Some(&listed(have)), &table(want));
        let word = |command: &Value| {
            let (verb, object) = command.as_object().unwrap().iter().next().unwrap();
            let rule = &object["rule"];
            match verb.as_str() {
                "delete" => format!("-{}", rule["handle"]),
                "insert" => format!("{}<{}", rule["comment"].as_str().unwrap(), rule["handle"]),
                "add" => rule["comment"].as_str().unwrap().to_owned(),
                other => other.to_owned(),
            }
        };
        commands.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn only_what_differs_is_written() {
        assert_eq!(short(&["a", "b", "c"], &["a", "b", "c"]), "");
        assert_eq!(short(&["a", "c"], &["a", "b", "c"]), "b<20");
        assert_eq!(short(&["a", "x", "b"], &["a", "b"]), "-20");
        assert_eq!(short(&["b", "a"], &["a", "b"]), "-10 b");
        assert_eq!(short(&["a"], &["x", "y", "a", "z"]), "x<10 y<10 z");
        assert_eq!(short(&["x", "y"], &["a"]), "-10 -20 a");
    }

    #[test]
    fn what_is_not_ours_in_a_table_makes_it_anew() {
        let mut have = listed(&["a"]);
        have.table.others.insert("flowtable x".to_owned());
        let commands = transaction(&id(), Some(&have), &table(&["a"]));
        assert_eq!(commands[0]["delete"]["table"]["name"], "vmctl.default.web");
        assert_eq!(commands.len(), 4);
    }

    #[test]
    fn only_elements_that_differ_are_written() {
        let with = |set: Option<Set>| {
            let sets = set.map(|set| ("own".to_owned(), set)).into_iter().collect();
            Table { sets, ..table(&["a"]) }
        };
        let set = |elements: &[&str]| {
            Some(Set::new("ipv4_addr", elements.iter().map(|&element| element.to_owned())))
        };
        let write = |have: Option<Set>, want: Option<Set>| {
            let have = Listed { table: with(have), ..listed(&["a"]) };
            let commands = transaction(&id(), Some(&have), &with(want));
            let word = |command: &Value| {
                let (verb, what) = command.as_object().unwrap().iter().next().unwrap();
                let (kind, body) = what.as_object().unwrap().iter().next().unwrap();
                let elements = body.get("elem").map(Value::to_string).unwrap_or_default();
                format!("{verb} {kind}{elements}")
            };
            commands.iter().map(word).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(write(set(&["a", "b"]), set(&["a", "b"])), "");
        assert_eq!(write(set(&["a", "b"]), set(&["b", "c"])), r#"delete element["a"], add element["c"]"#);
        assert_eq!(write(None, set(&["a"])), r#"add set, add element["a"]"#);
        assert_eq!(write(None, set(&[])), "add set");
        assert_eq!(write(set(&["a"]), None), "delete set");
        let numbers = Some(Set::new("mark", []));
        assert_eq!(write(numbers, set(&[])), "delete table, add table, add chain, add set, add rule");
    }

    #[test]
    fn names_of_tables_say_whose_they_are() {
        assert_eq!(id().owner.to_string(), "vmctl:default:Network/web");
        assert_eq!(id().to_string(), "inet vmctl.default.web");
        for other in ["vmctl", "vmctl.default", "filter", "vmctl.default.a.b", "vmctl.default.A", "docker"] {
            assert_eq!(TableId::parse("inet", other), None, "{other}");
        }
        assert_eq!(TableId::parse("ip", "vmctl.default.web"), None);
    }
}
