use vmctl::load::*;
fn main() {
    let mut inputs = vec![];
    for a in std::env::args().skip(1) {
        let p = std::path::PathBuf::from(a);
        inputs.push(if p.is_dir() { Input::Directory { path: p, recursive: true } } else { Input::File(p) });
    }
    let t = std::time::Instant::now();
    let l = load(&inputs, &Options::default());
    let e = t.elapsed();
    for p in &l.problems {
        println!("{p}");
    }
    println!(
        "{} manifests, {} problems, complete {}, {} in {:?}",
        l.manifests.len(),
        l.problems.len(),
        l.complete,
        l.fingerprint,
        e
    );
}
