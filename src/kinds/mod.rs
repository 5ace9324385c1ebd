//! The kinds: what each object means, what it refers to, how it compares with the host, and which
//! steps a difference needs. Pure knowledge: nothing here reaches the host or a file.
//!
//! A kind is a folder (`mod.rs` the inner form and its references, `wire.rs` the YAML form,
//! `compare.rs` differences to steps) and one row in each `match` of this file.

pub mod action;
pub mod bridge;
mod context;
pub mod host_policy;
pub mod image;
mod links;
pub mod network;
mod stable;
pub mod storage_pool;
pub mod virtual_machine;
pub mod vlan;
pub mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::host::snapshot::Capability;
use crate::name::{Kind, ObjectId, ObjectName, SetName};
use action::Action;
pub use context::{Context, link_of};
pub use links::describe_vlans;

/// A declared object, with its defaults applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Spec {
    HostPolicy(host_policy::HostPolicy),
    Bridge(bridge::Bridge),
    Vlan(vlan::Vlan),
    Network(network::Network),
    StoragePool(storage_pool::StoragePool),
    Image(image::Image),
    Volume(volume::Volume),
    VirtualMachine(virtual_machine::VirtualMachine),
}

/// What is wrong in a spec, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecProblem {
    /// RFC 6901, within the spec: `/interfaces/0/macAddress`.
    pub pointer: String,
    pub message: String,
    pub hint: Option<String>,
}

impl SpecProblem {
    pub fn new(pointer: impl Into<String>, message: impl ToString) -> Self {
        Self { pointer: pointer.into(), message: message.to_string(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A reference from one object to another, and where in the spec it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub to: ObjectId,
    pub pointer: String,
}

/// JSON Schema of a spec's YAML form.
pub fn spec_schema(kind: Kind) -> schemars::Schema {
    match kind {
        Kind::HostPolicy => schemars::schema_for!(host_policy::wire::HostPolicy),
        Kind::Bridge => schemars::schema_for!(bridge::wire::Bridge),
        Kind::Vlan => schemars::schema_for!(vlan::wire::Vlan),
        Kind::Network => schemars::schema_for!(network::wire::Network),
        Kind::StoragePool => schemars::schema_for!(storage_pool::wire::StoragePool),
        Kind::Image => schemars::schema_for!(image::wire::Image),
        Kind::Volume => schemars::schema_for!(volume::wire::Volume),
        Kind::VirtualMachine => schemars::schema_for!(virtual_machine::wire::VirtualMachine),
    }
}

/// From the YAML form (already checked against the schema) to the inner form.
pub fn decode(kind: Kind, spec: serde_json::Value) -> Result<Spec, Vec<SpecProblem>> {
    fn as_wire<T: DeserializeOwned>(spec: serde_json::Value) -> Result<T, Vec<SpecProblem>> {
        serde_json::from_value(spec).map_err(|error| vec![SpecProblem::new("", error)])
    }
    Ok(match kind {
        Kind::HostPolicy => Spec::HostPolicy(as_wire::<host_policy::wire::HostPolicy>(spec)?.decode()?),
        Kind::Bridge => Spec::Bridge(as_wire::<bridge::wire::Bridge>(spec)?.decode()?),
        Kind::Vlan => Spec::Vlan(as_wire::<vlan::wire::Vlan>(spec)?.decode()?),
        Kind::Network => Spec::Network(as_wire::<network::wire::Network>(spec)?.decode()?),
        Kind::StoragePool => Spec::StoragePool(as_wire::<storage_pool::wire::StoragePool>(spec)?.decode()?),
        Kind::Image => Spec::Image(as_wire::<image::wire::Image>(spec)?.decode()?),
        Kind::Volume => Spec::Volume(as_wire::<volume::wire::Volume>(spec)?.decode()?),
        Kind::VirtualMachine => {
            Spec::VirtualMachine(as_wire::<virtual_machine::wire::VirtualMachine>(spec)?.decode()?)
        }
    })
}

/// Collects problems while a wire form is decoded, so that all of them are reported.
#[derive(Default)]
pub(crate) struct Problems(Vec<SpecProblem>);

impl Problems {
    /// The value, or its problem noted at `pointer`.
    pub fn take<T, E: ToString>(&mut self, pointer: &str, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.add(SpecProblem::new(pointer, error.to_string()));
                None
            }
        }
    }

    pub fn add(&mut self, problem: SpecProblem) {
        self.0.push(problem);
    }

    /// `value` if there was no problem. It is `Some` whenever each part of it was.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Vec<SpecProblem>> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(self.0),
        }
    }
}

/// Everything that one set declares, references known to be good.
#[derive(Clone, Debug)]
pub struct Declared {
    pub set: SetName,
    pub objects: BTreeMap<ObjectId, Spec>,
}

/// Typed look-up of a declared object by its name.
macro_rules! lookup {
    ($fn:ident, $kind:ident, $type:ty) => {
        pub fn $fn(&self, name: &ObjectName) -> Option<&$type> {
            match self.objects.get(&ObjectId::new(Kind::$kind, name.clone())) {
                Some(Spec::$kind(spec)) => Some(spec),
                _ => None,
            }
        }
    };
}

impl Declared {
    lookup!(bridge, Bridge, bridge::Bridge);
    lookup!(vlan, Vlan, vlan::Vlan);
    lookup!(network, Network, network::Network);
    lookup!(pool, StoragePool, storage_pool::StoragePool);
    lookup!(image, Image, image::Image);
    lookup!(volume, Volume, volume::Volume);
    /// The one that a set may have.
    pub fn host_policy(&self) -> Option<&host_policy::HostPolicy> {
        // Kinds are sorted, and this is the first.
        match self.objects.first_key_value() {
            Some((_, Spec::HostPolicy(policy))) => Some(policy),
            _ => None,
        }
    }

    lookup!(vm, VirtualMachine, virtual_machine::VirtualMachine);
}

impl Spec {
    pub fn kind(&self) -> Kind {
        match self {
            Spec::HostPolicy(_) => Kind::HostPolicy,
            Spec::Bridge(_) => Kind::Bridge,
            Spec::Vlan(_) => Kind::Vlan,
            Spec::Network(_) => Kind::Network,
            Spec::StoragePool(_) => Kind::StoragePool,
            Spec::Image(_) => Kind::Image,
            Spec::Volume(_) => Kind::Volume,
            Spec::VirtualMachine(_) => Kind::VirtualMachine,
        }
    }

    /// The objects that it names, which must be declared too.
    pub fn references(&self) -> Vec<Reference> {
        match self {
            // (Whether a network's `bridge` is a declared one is not its own to say.)
            Spec::HostPolicy(_) | Spec::Bridge(_) | Spec::Network(_) | Spec::StoragePool(_) => Vec::new(),
            Spec::Vlan(spec) => spec.references(),
            Spec::Image(spec) => spec.references(),
            Spec::Volume(spec) => spec.references(),
            Spec::VirtualMachine(spec) => spec.references(),
        }
    }

    /// The abilities of the host that it needs.
    pub fn capabilities(&self) -> BTreeSet<Capability> {
        match self {
            Spec::Bridge(spec) if spec.settings.vlan_filtering => {
                [Capability::Bridge, Capability::VlanFiltering].into()
            }
            Spec::Bridge(_) => [Capability::Bridge].into(),
            Spec::Vlan(_) => [Capability::Vlan].into(),
            Spec::Network(spec) => {
                let service = spec.has_service().then_some(Capability::Dnsmasq);
                [Capability::Bridge, Capability::Nftables].into_iter().chain(service).collect()
            }
            Spec::VirtualMachine(spec) if spec.interfaces.is_empty() => [Capability::Kvm].into(),
            Spec::VirtualMachine(_) => [Capability::Kvm, Capability::Tun].into(),
            Spec::HostPolicy(_) | Spec::StoragePool(_) | Spec::Image(_) | Spec::Volume(_) => BTreeSet::new(),
        }
    }

    /// Files outside of pools that it reads.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Spec::Image(spec) => spec.source_path().into_iter().cloned().collect(),
            Spec::VirtualMachine(spec) => spec.files(),
            _ => Vec::new(),
        }
    }

    /// What must be done so that the host has it.
    pub fn compare(&self, id: &ObjectId, context: &Context) -> Action {
        match self {
            Spec::HostPolicy(spec) => host_policy::compare::compare(id, spec, context),
            Spec::Bridge(spec) => bridge::compare::compare(id, spec, context),
            Spec::Vlan(spec) => vlan::compare::compare(id, spec, context),
            Spec::Network(spec) => network::compare::compare(id, spec, context),
            Spec::StoragePool(spec) => storage_pool::compare::compare(id, spec, context),
            Spec::Image(spec) => image::compare::compare(id, spec, context),
            Spec::Volume(spec) => volume::compare::compare(id, spec, context),
            Spec::VirtualMachine(spec) => virtual_machine::compare::compare(id, spec, context),
        }
    }
}
