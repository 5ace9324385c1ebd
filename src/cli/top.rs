//! `vmctl top`: what each running VM uses, now.
//!
//! Two readings and the time between them make a line; the readings stop no VM. What a Prometheus exporter
//! would show are the same [`Usage`]s.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::args::parse_duration;
use super::console::no_such_vm;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::interrupt;
use super::power::vm_name;
use super::session::Session;
use crate::host::error::ObserveError;
use crate::host::linux::vm_usage::Usage;
use crate::name::ObjectName;
use crate::report::units::size;
use crate::vmm::metrics::{Latency, Metrics, Reading as _};

/// Shorter readings would show their own cost.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// A signal is noticed after this.
const WAIT: Duration = Duration::from_millis(100);
/// To the top of the screen; clear to the end of the line; clear to the end of the screen.
const HOME: &str = "\x1b[H";
const END_OF_LINE: &str = "\x1b[K";
const END_OF_SCREEN: &str = "\x1b[J";

/// Show what the running VMs use: processors, memory, disks, network
///
/// On a terminal the table is refreshed until Ctrl-C. Elsewhere, with --once or -o json, it is printed once.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Columns:
  CPU%     of one processor, all vCPUs together: 200 is two vCPUs that never rest
  STEAL%   time that vCPUs could have run and had to wait for a processor of the host
  MEMORY   what the guest has; RSS is what of it (and of the process itself) takes room on the host
  BALLOON  what the guest has given back through its balloon
  P99      within which 99 of 100 disk requests were answered
  EXITS    times a second that vCPUs came out of the guest, as KVM counts them (else as the process does)

Examples:
  vmctl top
  vmctl top web db --interval 5s
  vmctl top --sort memory --once
  vmctl top -o json | jq '.items[] | select(.cpuPercent > 90) | .name'")]
pub struct Command {
    /// Only these VMs: `web` or `vm/web`
    #[arg(value_name = "VM")]
    vms: Vec<String>,
    /// Print once, after one interval, and end
    #[arg(short = 'n', long)]
    once: bool,
    /// The time between two readings
    #[arg(short, long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    interval: Duration,
    /// The largest first; names from A to Z
    #[arg(short, long, value_name = "COLUMN", default_value = "cpu")]
    sort: Sort,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Sort {
    #[default]
    Cpu,
    Steal,
    Memory,
    Disk,
    Network,
    Exits,
    Name,
}

type Usages = BTreeMap<ObjectName, std::result::Result<Usage, ObserveError>>;

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let names = self.vms.iter().map(|vm| vm_name(vm)).collect::<Result<Vec<_>, _>>()?;
        if self.interval < INTERVAL_MIN {
            let least = INTERVAL_MIN.as_millis();
            return Err(CliError::usage(format!("--interval must be at least {least}ms")));
        }
        let host = session.host();
        let look = || {
            let seen = host.vm_usage(&names);
            seen.map_err(|error| CliError::failed(format!("could not look: {error}")))
        };
        let once = self.once || self.output == Format::Json || !session.out.is_terminal;
        let end = interrupt::flag();
        let mut before = look()?;
        if let Some(absent) = names.iter().find(|name| !before.contains_key(*name)) {
            return Err(self.absent(session, absent));
        }
        loop {
            let deadline = Instant::now() + self.interval;
            while Instant::now() < deadline {
                if end.load(Ordering::Relaxed) || session.out.is_closed() {
                    return Ok(Exit::Ok);
                }
                std::thread::sleep(WAIT.min(deadline.saturating_duration_since(Instant::now())));
            }
            let now = look()?;
            let (mut rows, failures) = rows(&before, &now);
            sort(&mut rows, self.sort);
            if !once {
                session.out.print(&screen(&rows, &failures, session));
                before = now;
                continue;
            }
            match self.output {
                Format::Json => session.out.json(&Document { items: rows })?,
                Format::Table if rows.is_empty() && failures.is_empty() => {
                    session.out.note("No VM runs on this host.");
                }
                Format::Table => session
                    .out
                    .print(&table(&rows).iter().map(|line| format!("{line}\n")).collect::<String>()),
            }
            for failure in &failures {
                session.out.error(&CliError::failed(failure.clone()));
            }
            return Ok(if failures.is_empty() { Exit::Ok } else { Exit::Failed });
        }
    }

    /// It doesn't run, or isn't there.
    fn absent(&self, session: &Session, name: &ObjectName) -> CliError {
        use crate::host::{Host as _, Scope};
        match session.host().snapshot(&Scope::default()).vms {
            Ok(vms) if vms.contains_key(name) => CliError::failed(format!("VM {name} does not run")),
            Ok(_) => no_such_vm(name),
            Err(error) => CliError::failed(format!("could not look: {error}")),
        }
    }
}

#[derive(Debug, Serialize)]
struct Document {
    items: Vec<Row>,
}

/// One VM between two readings. `None`: not known, for its process is an older one or was just started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    phase: &'static str,
    vcpus: u8,
    uptime_seconds: u64,
    cpu_percent: Option<f64>,
    steal_percent: Option<f64>,
    memory_bytes: u64,
    resident_bytes: u64,
    balloon_bytes: Option<u64>,
    disk_read_bytes_per_second: Option<u64>,
    disk_write_bytes_per_second: Option<u64>,
    disk_operations_per_second: Option<u64>,
    disk_p99_us: Option<u64>,
    network_received_bytes_per_second: Option<u64>,
    network_sent_bytes_per_second: Option<u64>,
    exits_per_second: Option<u64>,
}

/// And what could not be asked.
fn rows(before: &Usages, now: &Usages) -> (Vec<Row>, Vec<String>) {
    let mut rows = Vec::with_capacity(now.len());
    let mut failures = Vec::new();
    for (name, usage) in now {
        match usage {
            Ok(usage) => {
                let earlier = before.get(name).and_then(|usage| usage.as_ref().ok());
                rows.push(row(name, earlier, usage));
            }
            Err(error) => failures.push(error.to_string()),
        }
    }
    (rows, failures)
}

fn row(name: &ObjectName, before: Option<&Usage>, now: &Usage) -> Row {
    let row = Row {
        name: name.to_string(),
        phase: phase(now),
        vcpus: now.state.config.vcpus,
        uptime_seconds: now.state.uptime_ms / 1000,
        memory_bytes: now.state.config.memory_bytes,
        resident_bytes: now.process.resident_bytes,
        balloon_bytes: now.metrics.as_ref().and_then(|metrics| Some(metrics.balloon.as_ref()?.actual_bytes)),
        ..Default::default()
    };
    // Of another process, counts can't be compared.
    let Some(before) = before.filter(|before| before.state.pid == now.state.pid) else { return row };
    let elapsed = now.at.saturating_duration_since(before.at);
    if elapsed.is_zero() {
        return row;
    }
    let percent = |is: u64, was: u64| Some(is.saturating_sub(was) as f64 * 100.0 / elapsed.as_nanos() as f64);
    let row = Row {
        cpu_percent: percent(now.process.vcpu_run_ns, before.process.vcpu_run_ns),
        steal_percent: percent(now.process.vcpu_wait_ns, before.process.vcpu_wait_ns),
        ..row
    };
    let (Some(is), Some(was)) = (&now.metrics, &before.metrics) else { return row };
    let rate = |count: fn(&Metrics) -> u64| {
        Some((count(is).saturating_sub(count(was)) as f64 / elapsed.as_secs_f64()).round() as u64)
    };
    Row {
        disk_read_bytes_per_second: rate(|of| of.disks.values().map(|disk| disk.read_bytes).sum()),
        disk_write_bytes_per_second: rate(|of| of.disks.values().map(|disk| disk.written_bytes).sum()),
        disk_operations_per_second: rate(|of| {
            of.disks.values().map(|disk| disk.reads + disk.writes + disk.flushes + disk.discards).sum()
        }),
        disk_p99_us: disk_latency(is).since(&disk_latency(was)).percentile_us(99),
        network_received_bytes_per_second: rate(|of| of.nics.values().map(|nic| nic.received_bytes).sum()),
        network_sent_bytes_per_second: rate(|of| of.nics.values().map(|nic| nic.sent_bytes).sum()),
        exits_per_second: rate(exits),
        ..row
    }
}

fn phase(usage: &Usage) -> &'static str {
    use crate::vmm::protocol::Phase;
    match usage.state.phase {
        Phase::Running => "Running",
        Phase::Paused => "Paused",
        Phase::Stopping => "Stopping",
    }
}

/// Reads, writes and flushes of all disks.
fn disk_latency(metrics: &Metrics) -> Latency {
    let mut all = Latency::default();
    for disk in metrics.disks.values() {
        for latency in [&disk.read_latency, &disk.write_latency, &disk.flush_latency] {
            all.merge(latency);
        }
    }
    all
}

fn exits(metrics: &Metrics) -> u64 {
    let of_vcpu = |vcpu: &crate::vmm::metrics::VcpuMetrics| match &vcpu.kvm {
        Some(kvm) => kvm.exits,
        None => {
            let seen = &vcpu.exits;
            [
                seen.port_reads,
                seen.port_writes,
                seen.mmio_reads,
                seen.mmio_writes,
                seen.halts,
                seen.interrupt_windows,
                seen.interrupted,
                seen.again,
                seen.others,
            ]
            .iter()
            .sum()
        }
    };
    metrics.vcpus.iter().map(of_vcpu).sum()
}

/// What isn't known comes last; equal ones by name.
fn sort(rows: &mut [Row], by: Sort) {
    let permille = |percent: Option<f64>| percent.map(|percent| (percent * 10.0) as u64);
    let sum = |one: Option<u64>, two: Option<u64>| Some(one? + two?);
    rows.sort_by_cached_key(|row| {
        let key = match by {
            Sort::Cpu => permille(row.cpu_percent),
            Sort::Steal => permille(row.steal_percent),
            Sort::Memory => Some(row.resident_bytes),
            Sort::Disk => sum(row.disk_read_bytes_per_second, row.disk_write_bytes_per_second),
            Sort::Network => sum(row.network_received_bytes_per_second, row.network_sent_bytes_per_second),
            Sort::Exits => row.exits_per_second,
            Sort::Name => None,
        };
        (Reverse(key), row.name.clone())
    });
}

const HEAD: [&str; 13] = [
    "NAME", "VCPUS", "CPU%", "STEAL%", "MEMORY", "RSS", "BALLOON", "READ/S", "WRITE/S", "P99", "IN/S",
    "OUT/S", "EXITS/S",
];

fn cells(row: &Row) -> [String; HEAD.len()] {
    let maybe = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let percent = |value: Option<f64>| maybe(value.map(|value| format!("{value:.1}")));
    let bytes = |value: Option<u64>| maybe(value.map(size));
    let name =
        if row.phase == "Running" { row.name.clone() } else { format!("{} ({})", row.name, row.phase) };
    [
        name,
        row.vcpus.to_string(),
        percent(row.cpu_percent),
        percent(row.steal_percent),
        size(row.memory_bytes),
        size(row.resident_bytes),
        bytes(row.balloon_bytes),
        bytes(row.disk_read_bytes_per_second),
        bytes(row.disk_write_bytes_per_second),
        maybe(row.disk_p99_us.map(microseconds)),
        bytes(row.network_received_bytes_per_second),
        bytes(row.network_sent_bytes_per_second),
        maybe(row.exits_per_second.map(|exits| exits.to_string())),
    ]
}

/// `850us`, `1.3ms`, `12ms`, `2.0s`.
fn microseconds(us: u64) -> String {
    match us {
        0..1000 => format!("{us}us"),
        1000..10_000 => format!("{:.1}ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{}ms", us / 1000),
        _ => format!("{:.1}s", us as f64 / 1e6),
    }
}

/// Head and lines: names to the left, numbers to the right.
fn table(rows: &[Row]) -> Vec<String> {
    let lines: Vec<[String; HEAD.len()]> =
        std::iter::once(HEAD.map(str::to_owned)).chain(rows.iter().map(cells)).collect();
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String; HEAD.len()]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    lines.iter().map(line).collect()
}

/// One picture for a terminal: no longer and no wider than it is, in place of the one before.
fn screen(rows: &[Row], failures: &[String], session: &Session) -> String {
    let style = session.out.style;
    let height = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(24, |size| usize::from(size.ws_row));
    let cut = |line: &str| line.chars().take(style.width.unwrap_or(usize::MAX)).collect::<String>();
    let mut lines: Vec<String> = table(rows).iter().map(|line| cut(line)).collect();
    lines[0] = style.bold(&lines[0]);
    // The last line of a screen is left alone: a line feed there would scroll.
    let room = height.saturating_sub(2).max(2);
    let hidden = (lines.len() + failures.len()).saturating_sub(room);
    if hidden > 0 {
        lines.truncate(room.saturating_sub(1 + failures.len()).max(1));
        let hidden = rows.len() + 1 - lines.len();
        lines.push(style.dim(&cut(&format!("and {hidden} more"))));
    } else if rows.is_empty() && failures.is_empty() {
        lines.push("No VM runs on this host.".to_owned());
    }
    lines.extend(failures.iter().map(|failure| style.red(&cut(failure))));
    lines.truncate(room);
    let body: String = lines.iter().map(|line| format!("{line}{END_OF_LINE}\n")).collect();
    format!("{HOME}{body}{END_OF_SCREEN}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::linux::vm_usage::ProcessUsage;
    use crate::vmm::config::{BootConfig, VmConfig};
    use crate::vmm::metrics::{DiskCounters, KvmCounts, NicMetrics, VcpuMetrics};
    use crate::vmm::protocol::{Phase, VERSION, VmState};

    fn usage(pid: i32, at: Instant, metrics: Option<Metrics>, process: ProcessUsage) -> Usage {
        let config = VmConfig::new("web", "mark", 1 << 30, BootConfig::kernel("k", None, ""));
        let state = VmState {
            version: VERSION,
            program: String::new(),
            pid,
            phase: Phase::Running,
            uptime_ms: 5000,
            reboots: 0,
            config,
            disk_capacity_bytes: Vec::new(),
            conditions: Vec::new(),
        };
        Usage { at, state, metrics, process }
    }

    fn name() -> ObjectName {
        ObjectName::parse("web").unwrap()
    }

    #[test]
    fn rates_are_what_came_between_two_readings() {
        let counters = DiskCounters::default();
        let metrics = |exits, received| Metrics {
            vcpus: vec![VcpuMetrics {
                kvm: Some(KvmCounts { exits, ..Default::default() }),
                ..Default::default()
            }],
            disks: [("root".to_owned(), counters.snapshot())].into(),
            nics: [("lan".to_owned(), NicMetrics { received_bytes: received, ..Default::default() })].into(),
            ..Default::default()
        };
        let begun = Instant::now();
        counters.read_latency.record(Duration::from_secs(3));
        let process =
            |run, wait| ProcessUsage { resident_bytes: 5 << 20, vcpu_run_ns: run, vcpu_wait_ns: wait };
        let before = usage(7, begun, Some(metrics(100, 0)), process(1_000_000_000, 0));
        counters.reads.add(20);
        counters.read_bytes.add(8192);
        counters.read_latency.record(Duration::from_micros(100));
        let now = usage(
            7,
            begun + Duration::from_secs(2),
            Some(metrics(1100, 4096)),
            process(2_500_000_000, 500_000_000),
        );
        let row = row(&name(), Some(&before), &now);
        assert_eq!((row.cpu_percent, row.steal_percent), (Some(75.0), Some(25.0)));
        assert_eq!((row.disk_read_bytes_per_second, row.disk_operations_per_second), (Some(4096), Some(10)));
        assert_eq!((row.network_received_bytes_per_second, row.exits_per_second), (Some(2048), Some(500)));
        let p99 = row.disk_p99_us.unwrap();
        assert!((100..=112).contains(&p99), "{p99}: not that of the slow one before");
    }

    #[test]
    fn what_is_not_known_is_a_dash_and_comes_last() {
        let begun = Instant::now();
        let one = usage(7, begun, None, ProcessUsage::default());
        let later =
            usage(8, begun + Duration::from_secs(1), Some(Metrics::default()), ProcessUsage::default());
        // Another process under the same name.
        let fresh = row(&name(), Some(&one), &later);
        assert_eq!((fresh.cpu_percent, fresh.exits_per_second), (None, None));
        let line = &table(std::slice::from_ref(&fresh))[1];
        assert_eq!(line.split_whitespace().filter(|cell| *cell == "-").count(), 9, "{line}");
        let busy = Row { name: "busy".into(), cpu_percent: Some(0.0), ..fresh.clone() };
        let mut rows = [fresh, busy];
        sort(&mut rows, Sort::Cpu);
        assert_eq!(rows[0].name, "busy");
    }

    #[test]
    fn rows_are_sorted_by_what_is_asked_for() {
        let row = |name: &str, cpu: f64, resident_bytes, read| Row {
            name: name.into(),
            cpu_percent: Some(cpu),
            resident_bytes,
            disk_read_bytes_per_second: Some(read),
            disk_write_bytes_per_second: Some(0),
            ..Default::default()
        };
        let mut rows = [row("b", 1.0, 3, 5), row("a", 1.0, 2, 9), row("c", 99.5, 1, 7)];
        let mut order = |by| {
            sort(&mut rows, by);
            rows.iter().map(|row| row.name.as_str()).collect::<String>()
        };
        assert_eq!(order(Sort::Cpu), "cab");
        assert_eq!(order(Sort::Memory), "bac");
        assert_eq!(order(Sort::Disk), "acb");
        assert_eq!(order(Sort::Name), "abc");
    }

    #[test]
    fn times_are_short() {
        for (us, text) in [(0, "0us"), (999, "999us"), (1300, "1.3ms"), (12_700, "12ms"), (2_000_000, "2.0s")]
        {
            assert_eq!(microseconds(us), text);
        }
    }
}
