//! The command line: see `vmctl::cli`.

fn main() -> std::process::ExitCode {
    vmctl::cli::main(std::env::args_os())
}
