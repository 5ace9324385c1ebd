//! The VM process. `vmctl` starts it, with a launch socket as descriptor 3; a person never does.

use std::process::ExitCode;

use vmctl::vmm::launch;

const HELP: &str = "\
vmctl-vmm: runs one virtual machine. vmctl starts it; it takes its orders from a launch socket.

usage: vmctl-vmm [NAME]     NAME shows in ps and means nothing else
       vmctl-vmm --version
       vmctl-vmm --help";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(flag), None) if flag == "--version" => println!("vmctl-vmm {}", env!("CARGO_PKG_VERSION")),
        (Some(flag), None) if flag == "--help" || flag == "-h" => println!("{HELP}"),
        (name, None) if name.as_ref().is_none_or(|name| !name.to_string_lossy().starts_with('-')) => {
            return launch::run();
        }
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
