//! One report of all volume groups, as `lvm fullreport` gives it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Deserialize;

use super::command::{self, CommandError};
use super::tags::Tags;
use crate::host::error::{ObserveError, StepError};
use crate::host::snapshot::{GroupFacts, LvmPlace, Observed, ThinFacts};

const ARGUMENTS: &[&str] = &[
    "fullreport",
    "--reportformat",
    "json",
    "--units",
    "b",
    "--nosuffix",
    "--configreport",
    "vg",
    "-o",
    "vg_name,vg_tags,vg_attr,vg_extent_size,vg_size,vg_free",
    "--configreport",
    "lv",
    "-o",
    "lv_name,lv_uuid,lv_attr,lv_tags,lv_size,lv_layout,lv_role,pool_lv,data_percent,metadata_percent,\
     lv_when_full",
    "--configreport",
    "pv",
    "-o",
    "pv_name,vg_name",
    "--configreport",
    "pvseg",
    "-o",
    "pvseg_start",
    "--configreport",
    "seg",
    "-o",
    "seg_start",
];

#[derive(Deserialize)]
struct Document {
    report: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    vg: Vec<GroupRow>,
    #[serde(default)]
    lv: Vec<VolumeRow>,
    #[serde(default)]
    pv: Vec<DeviceRow>,
}

#[derive(Deserialize)]
struct GroupRow {
    vg_name: String,
    vg_tags: String,
    vg_attr: String,
    vg_extent_size: String,
    vg_size: String,
    vg_free: String,
}

#[derive(Deserialize)]
struct VolumeRow {
    lv_name: String,
    lv_uuid: String,
    lv_attr: String,
    lv_tags: String,
    lv_size: String,
    lv_layout: String,
    lv_role: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
    lv_when_full: String,
}

#[derive(Deserialize)]
struct DeviceRow {
    pv_name: String,
    vg_name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub groups: BTreeMap<String, Group>,
    /// Physical volumes that are in no group.
    pub orphans: BTreeSet<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub tags: Tags,
    pub extent_bytes: u64,
    pub bytes: u64,
    pub free_bytes: u64,
    pub unusable: Option<String>,
    pub volumes: BTreeMap<String, LogicalVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    pub uuid: String,
    pub tags: Tags,
    pub bytes: u64,
    pub shape: Shape,
    pub active: bool,
    /// Of a thin volume or pool, in hundredths of a per cent.
    pub data_used: u32,
    pub metadata_used: u32,
    /// Of a thin pool: new blocks read as zeroes.
    pub zeroes: bool,
    /// Of a thin pool: a write that finds no room fails at once.
    pub errors_when_full: bool,
    pub failing: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Its extents are its own: linear, striped, mirrored.
    Linear,
    Thin {
        pool: String,
    },
    ThinPool,
    /// Part of another one, or of a shape that is not ours to use.
    Other,
}

impl Report {
    pub fn take() -> Observed<Self> {
        let what = "look at the volume groups";
        let failed = |error: CommandError| ObserveError::new(what, error.why("lvm"));
        Self::parse(&command::lvm(ARGUMENTS).map_err(failed)?)
            .map_err(|why| ObserveError::new(what, format!("`lvm fullreport`: {why}")))
    }

    /// As [`Self::take`], while something is done.
    pub fn for_step(what: &str) -> Result<Self, StepError> {
        Self::take().map_err(|error| StepError::Failed {
            what: what.to_owned(),
            why: error.to_string(),
            hint: CommandError::Missing.hint().filter(|_| error.why.contains("not installed")),
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let document: Document = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut report = Self::default();
        for section in document.report {
            for device in section.pv.iter().filter(|device| device.vg_name.is_empty()) {
                report.orphans.insert(PathBuf::from(&device.pv_name));
            }
            let Some(row) = section.vg.into_iter().next() else { continue };
            let name = row.vg_name.clone();
            let mut group = Group::parse(row)?;
            for row in section.lv {
                let (name, volume) = LogicalVolume::parse(row)?;
                group.volumes.insert(name, volume);
            }
            if let Some(twin) = report.groups.get_mut(&name) {
                twin.unusable = Some("there are two volume groups of this name".to_owned());
            } else {
                report.groups.insert(name, group);
            }
        }
        Ok(report)
    }

    pub fn group(&self, place: &LvmPlace, what: &str) -> Result<&Group, StepError> {
        let Some(group) = self.groups.get(place.group.as_str()) else {
            return Err(StepError::failed(what, format!("there is no volume group {}", place.group)));
        };
        match &group.unusable {
            Some(why) => Err(StepError::failed(what, format!("volume group {}: {why}", place.group))),
            None => Ok(group),
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|_| format!("`{text}` is no number"))
}

/// `12.34` as 1234. Empty where it has no meaning.
fn hundredths(text: &str) -> u32 {
    let (whole, part) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
    let digits: String = part.chars().chain("00".chars()).take(2).collect();
    let whole: u32 = whole.parse().unwrap_or(0);
    whole.saturating_mul(100).saturating_add(digits.parse().unwrap_or(0)).min(10_000)
}

impl Group {
    fn parse(row: GroupRow) -> Result<Self, String> {
        // `wz--n-`: permissions, resizeable, exported, partial, allocation, clustered or shared.
        let attribute = |at: usize| row.vg_attr.chars().nth(at).unwrap_or('-');
        let unusable = match (attribute(0), attribute(2), attribute(3), attribute(5)) {
            ('r', ..) => Some("it is read-only"),
            (_, 'x', ..) => Some("it is exported"),
            (_, _, 'p', _) => Some("one of its devices is missing"),
            (_, _, _, 'c' | 's') => Some("it is shared between hosts, which vmctl can't do"),
            _ => None,
        };
        Ok(Self {
            tags: Tags::parse(&row.vg_tags),
            extent_bytes: number(&row.vg_extent_size)?.max(1),
            bytes: number(&row.vg_size)?,
            free_bytes: number(&row.vg_free)?,
            unusable: unusable.map(str::to_owned),
            volumes: BTreeMap::new(),
        })
    }

    /// The thin pool, if this is one of that name.
    pub fn thin_pool(&self, place: &LvmPlace) -> Option<&LogicalVolume> {
        let volume = self.volumes.get(place.thin_pool.as_ref()?.as_str())?;
        (volume.shape == Shape::ThinPool).then_some(volume)
    }

    /// Whether a logical volume is one of this pool.
    pub fn holds(place: &LvmPlace, volume: &LogicalVolume) -> bool {
        match (&volume.shape, &place.thin_pool) {
            (Shape::Linear, None) => true,
            (Shape::Thin { pool }, Some(name)) => pool == name.as_str(),
            _ => false,
        }
    }

    pub fn facts(&self, place: &LvmPlace) -> GroupFacts {
        let others = self.volumes.iter().filter(|(_, volume)| !Self::holds(place, volume));
        let other_names = others.map(|(name, _)| name.clone()).filter(|name| {
            self.thin_pool(place).is_none()
                || Some(name.as_str()) != place.thin_pool.as_ref().map(|pool| pool.as_str())
        });
        GroupFacts {
            extent_bytes: self.extent_bytes,
            free_bytes: self.free_bytes,
            other_names: other_names.collect(),
            unusable: self.unusable.clone(),
            thin: self.thin_pool(place).map(|pool| ThinFacts {
                data_used: pool.data_used,
                metadata_used: pool.metadata_used,
                zeroes: pool.zeroes,
                failing: pool.failing.clone(),
            }),
        }
    }

    pub fn round_up(&self, bytes: u64) -> u64 {
        bytes.checked_next_multiple_of(self.extent_bytes).unwrap_or(u64::MAX)
    }
}

impl LogicalVolume {
    fn parse(row: VolumeRow) -> Result<(String, Self), String> {
        // `twi-aotz--`: type, permissions, allocation, fixed minor, state, open, target, zeroes, health, skip.
        let attribute = |at: usize| row.lv_attr.chars().nth(at).unwrap_or('-');
        let has = |list: &str, word: &str| list.split(',').any(|item| item == word);
        let public = has(&row.lv_role, "public");
        let shape = if attribute(0) == 't' {
            // LVM counts it as private, for it can't be opened.
            Shape::ThinPool
        } else if !public {
            Shape::Other
        } else if has(&row.lv_layout, "thin") {
            Shape::Thin { pool: row.pool_lv }
        } else if ["linear", "striped", "mirror", "raid"].iter().any(|layout| has(&row.lv_layout, layout))
            && !has(&row.lv_role, "snapshot")
        {
            Shape::Linear
        } else {
            Shape::Other
        };
        let failing = match attribute(8) {
            'D' => Some("out of data space"),
            'M' => Some("read-only in its metadata: it needs a repair"),
            'F' => Some("failed"),
            'p' => Some("lacking a device"),
            _ => None,
        };
        let volume = Self {
            uuid: row.lv_uuid,
            tags: Tags::parse(&row.lv_tags),
            bytes: number(&row.lv_size)?,
            shape,
            active: attribute(4) == 'a',
            data_used: hundredths(&row.data_percent),
            metadata_used: hundredths(&row.metadata_percent),
            zeroes: attribute(7) == 'z',
            errors_when_full: row.lv_when_full == "error",
            failing: failing.map(str::to_owned),
        };
        Ok((row.lv_name, volume))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"  { "report": [
        { "vg": [ {"vg_name":"vg0", "vg_tags":"vmctl.owner=vmctl:default:StoragePool/fast,x",
                   "vg_attr":"wz--n-", "vg_extent_size":"4194304", "vg_size":"532676608", "vg_free":"293601280"} ],
          "pv": [ {"pv_name":"/dev/loop0", "vg_name":"vg0"} ],
          "lv": [
            {"lv_name":"data", "lv_uuid":"a", "lv_attr":"-wi-a-----", "lv_tags":"", "lv_size":"20971520",
             "lv_layout":"linear", "lv_role":"public", "pool_lv":"", "data_percent":"", "metadata_percent":"", "lv_when_full":""},
            {"lv_name":"thin", "lv_uuid":"b", "lv_attr":"twi-aotzD-", "lv_tags":"vmctl.making", "lv_size":"209715200",
             "lv_layout":"thin,pool", "lv_role":"private", "pool_lv":"", "data_percent":"100.00", "metadata_percent":"10.9", "lv_when_full":"error"},
            {"lv_name":"t1", "lv_uuid":"c", "lv_attr":"Vwi---tz-k", "lv_tags":"", "lv_size":"54525952",
             "lv_layout":"thin,sparse", "lv_role":"public,origin,thinorigin", "pool_lv":"thin", "data_percent":"7.25",
             "metadata_percent":"", "lv_when_full":""},
            {"lv_name":"lvol0_pmspare", "lv_uuid":"d", "lv_attr":"ewi-------", "lv_tags":"", "lv_size":"4194304",
             "lv_layout":"linear", "lv_role":"private,pool,spare", "pool_lv":"", "data_percent":"", "metadata_percent":"", "lv_when_full":""}
          ], "pvseg": [], "seg": [] },
        { "pv": [ {"pv_name":"/dev/loop1", "vg_name":""} ], "pvseg": [] } ] }"#;

    #[test]
    fn a_report_is_read() {
        let report = Report::parse(TEXT).unwrap();
        assert_eq!(report.orphans, BTreeSet::from([PathBuf::from("/dev/loop1")]));
        let group = &report.groups["vg0"];
        assert_eq!(group.tags.owner, "vmctl:default:StoragePool/fast".parse().ok());
        assert_eq!(group.round_up(1), 4 << 20);
        let shapes: Vec<&Shape> = group.volumes.values().map(|volume| &volume.shape).collect();
        let thin = Shape::Thin { pool: "thin".to_owned() };
        assert_eq!(shapes, [&Shape::Linear, &Shape::Other, &thin, &Shape::ThinPool]);
        let pool = &group.volumes["thin"];
        assert_eq!((pool.data_used, pool.metadata_used), (10000, 1090));
        assert!(pool.zeroes && pool.errors_when_full);
        assert_eq!(pool.failing.as_deref(), Some("out of data space"));
        assert!(group.volumes["data"].active && !group.volumes["t1"].active);
        assert_eq!(group.volumes["t1"].data_used, 725);

        let place = |thin: Option<&str>| LvmPlace {
            group: "vg0".parse().unwrap(),
            thin_pool: thin.map(|name| name.parse().unwrap()),
        };
        let others = |thin| group.facts(&place(thin)).other_names.into_iter().collect::<Vec<_>>();
        assert_eq!(others(None), ["lvol0_pmspare", "t1", "thin"]);
        assert_eq!(others(Some("thin")), ["data", "lvol0_pmspare"]);
        assert_eq!(others(Some("data")), ["data", "lvol0_pmspare", "t1", "thin"]);
    }

    #[test]
    fn what_makes_a_group_unusable_is_named() {
        let with = |attr: &str| {
            let report = Report::parse(&TEXT.replace("wz--n-", attr)).unwrap();
            report.groups["vg0"].unusable.clone()
        };
        assert_eq!(with("wz--n-"), None);
        for attr in ["rz--n-", "wzx-n-", "wz-pn-", "wz--ns"] {
            assert!(with(attr).is_some(), "{attr}");
        }
        assert!(Report::parse("{}").is_err());
    }
}
