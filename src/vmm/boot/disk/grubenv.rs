//! GRUB's environment block: a file of 1024 bytes with `name=value` lines and `#` for what is free.

const SIGNATURE: &str = "# GRUB Environment Block\n";
pub(super) const BYTES_MAX: u64 = 64 << 10;
const VARIABLES_MAX: usize = 256;

pub(super) fn parse(text: &str) -> Vec<(String, String)> {
    let Some(text) = text.strip_prefix(SIGNATURE) else { return Vec::new() };
    let mut found = Vec::new();
    let mut characters = text.chars();
    while found.len() < VARIABLES_MAX {
        // A backslash takes the next character, a line's end included, as it is.
        let mut line = String::new();
        let mut ended = true;
        while let Some(character) = characters.next() {
            match character {
                '\\' => line.extend(characters.next()),
                '\n' => {
                    ended = false;
                    break;
                }
                other => line.push(other),
            }
        }
        if let Some((name, value)) = line.split_once('=')
            && !line.starts_with('#')
        {
            found.push((name.to_owned(), value.to_owned()));
        }
        if ended {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read() {
        let block = format!("{SIGNATURE}saved_entry=debian\nkernelopts=a \\\\ b\\\nc\n{}", "#".repeat(900));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(parse(&block), [pair("saved_entry", "debian"), pair("kernelopts", "a \\ b\nc")]);
        assert_eq!(parse("saved_entry=debian\n"), []);
    }
}
