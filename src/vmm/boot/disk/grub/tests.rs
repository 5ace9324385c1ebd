use super::super::menu::{Entry, Menu};
use super::*;

/// As Debian's own grub-mkconfig wrote it.
const DEBIAN: &str = include_str!("debian12.cfg");

/// Runs a script without a disk: paths resolve to nothing, so kernels show in the refusals.
fn menu_of(text: &str) -> Result<Menu, String> {
    let mut run = Run::new(&[], 0, "/boot/grub/grub.cfg");
    run.text(text)?;
    run.into_menu(String::new())
}

fn titles(text: &str) -> Vec<String> {
    menu_of(text).unwrap().entries.into_iter().map(|entry| entry.title).collect()
}

fn chosen(text: &str) -> Entry {
    menu_of(text).unwrap().pick(None).unwrap().clone()
}

#[test]
fn debians_configuration_is_understood() {
    let menu = menu_of(DEBIAN).unwrap();
    let titles: Vec<&str> = menu.entries.iter().map(|entry| entry.title.as_str()).collect();
    assert_eq!(
        titles,
        [
            "Debian GNU/Linux",
            "Debian GNU/Linux, with Linux 6.1.0-56-cloud-amd64",
            "Debian GNU/Linux, with Linux 6.1.0-56-cloud-amd64 (recovery mode)",
        ]
    );
    assert_eq!(menu.default, 0);
    assert_eq!(menu.entries[0].id, "gnulinux-simple-6f1b0d7c-6a1e-4f0b-9d53-0b5c5d1f2a11");
}

#[test]
fn the_default_is_found_by_number_title_id_and_path() {
    let menu = |default: &str| {
        chosen(&format!(
            "set default=\"{default}\"\nmenuentry a --id=x {{ true; }}\nsubmenu b --id y {{ menuentry c {{ true\n}}\n menuentry 'd e' --class f {{ true\n}}\n}}\nmenuentry g {{ true; }}"
        ))
        .title
    };
    for (default, title) in [
        ("0", "a"),
        ("x", "a"),
        ("", "a"),
        ("2", "g"),
        ("g", "g"),
        ("1", "c"),
        ("1>1", "d e"),
        ("y>d e", "d e"),
        ("b>c", "c"),
        ("7", "a"),
        ("nonsense", "a"),
    ] {
        assert_eq!(menu(default), title, "{default}");
    }
}

#[test]
fn the_language_means_what_it_means_in_grub() {
    // Each line that holds becomes an entry's title.
    let script = r#"
        function show { menuentry "$1" { true; } }
        set a='one two'
        set b="$a three"
        show "$b"
        show $a
        show "a\"b\\c\$d"
        show pre${a}post
        if [ "$a" = "one two" -a -z "$none" ]; then show and; fi
        if [ x$nothing = xy ]; then show no; elif test 2 -gt 10; then show no; else show else; fi
        if ! [ -f /boot/vmlinuz ]; then show not; fi
        for i in 1 2 3; do show $i; done
        set n=x
        while [ "$n" != xxx ]; do n=x$n; done
        show $n
        until true; do show never; done
        unknown_command; show "$?"
        true; show $? # a comment; show never
        show con\
tinued; show a#b
    "#;
    let expected = [
        "one two three",
        "one",
        "a\"b\\c$d",
        "preone",
        "and",
        "else",
        "not",
        "1",
        "2",
        "3",
        "xxx",
        "1",
        "0",
        "continued",
        "a#b",
    ];
    assert_eq!(titles(script), expected);
}

#[test]
fn what_is_no_script_is_an_error() {
    for (script, part) in [
        ("if true; then", "ends before"),
        ("menuentry a {", "ends before"),
        ("}", "ends nothing"),
        ("set a='b", "quote"),
        ("for", "variable"),
        ("function f", "block"),
        ("{ true; }", "begins nothing"),
    ] {
        let error = menu_of(script).unwrap_err();
        assert!(error.contains(part) && error.contains("line 1"), "{script}: {error}");
    }
}

#[test]
fn nothing_runs_without_end() {
    for script in [
        "while true; do true; done".to_owned(),
        "while true; do done".to_owned(),
        "function f { f; }\nf".to_owned(),
        "for i in 1 2 3 4 5 6 7 8 9; do ".repeat(20) + "true" + &"; done".repeat(20),
        "set a=aaaaaaaaaaaaaaaa\n".to_owned() + &"set a=$a$a$a$a\n".repeat(20),
        "if true; then ".repeat(40),
        "menuentry a {\n".repeat(40),
        (0..2000).map(|number| format!("menuentry {number} {{ true; }}\n")).collect(),
        (0..2000).map(|number| format!("set v{number}=1\n")).collect(),
        format!("menuentry a {{ {} }}\n", "true\n".repeat(60_000)),
    ] {
        assert!(menu_of(&script).is_err(), "{}", &script[..script.len().min(40)]);
    }
    assert_eq!(
        run_text(
            "submenu a { submenu b { submenu c { submenu d { submenu e { menuentry f { true; } } } } } }"
        ),
        0
    );
}

#[test]
fn an_entry_says_why_it_cannot_be_booted() {
    let refusal = |script: &str| chosen(script).boot.unwrap_err();
    assert!(refusal("menuentry a { chainloader +1\n}").contains("chainloader"));
    assert!(refusal("menuentry a { true\n}").contains("no Linux kernel"));
    assert!(refusal("set root=hd1,gpt1\nmenuentry a { linux /vmlinuz\n}").contains("hd1,gpt1"));
}
