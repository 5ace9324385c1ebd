//! `vmctl get leases`: the addresses that guests have of networks' DHCP.

use serde::Serialize;

use super::Format;
use crate::cli::error::{CliError, Result};
use crate::cli::objects::{Lease, Object, Status};
use crate::cli::session::Session;
use crate::report::units::duration;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    network: &'a str,
    set: &'a str,
    #[serde(flatten)]
    lease: &'a Lease,
}

pub fn is_asked_for(words: &[String]) -> bool {
    matches!(words, [word] if word.eq_ignore_ascii_case("leases") || word.eq_ignore_ascii_case("lease"))
}

pub fn print(session: &Session, all: &[Object], format: Format) -> Result<()> {
    let mut rows = Vec::new();
    for object in all {
        let Status::Network(network) = &object.status else { continue };
        let row = |lease| Row { network: object.id.name.as_str(), set: object.set.as_str(), lease };
        rows.extend(network.leases.iter().map(row));
    }
    match format {
        Format::Json => session.out.json(&rows)?,
        Format::Yaml => {
            let text = serde_saphyr::to_string(&rows);
            session.out.print(&text.map_err(|error| CliError::failed(format!("write YAML: {error}")))?);
        }
        Format::Name => {
            session.out.print(&rows.iter().map(|row| format!("{}\n", row.lease.address)).collect::<String>())
        }
        Format::Table | Format::Wide if rows.is_empty() => session.out.note("There are none on this host."),
        Format::Table | Format::Wide => session.out.print(&table(&rows)),
    }
    Ok(())
}

fn table(rows: &[Row]) -> String {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let expires = |lease: &Lease| match lease.expires_unix_seconds {
        None => "never".to_owned(),
        Some(at) if at <= now => "over".to_owned(),
        Some(at) => format!("in {}", duration(at - now)),
    };
    let mut lines = vec![["ADDRESS", "NAME", "MAC", "NETWORK", "EXPIRES"].map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        let lease = row.lease;
        let name = lease.host_name.clone().unwrap_or("-".to_owned());
        [
            lease.address.to_string(),
            name,
            lease.mac_address.map_or("-".to_owned(), |mac| mac.to_string()),
            row.network.to_owned(),
            expires(lease),
        ]
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let text = |line: &[String; 5]| {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("   ").trim_end())
    };
    lines.iter().map(text).collect()
}
