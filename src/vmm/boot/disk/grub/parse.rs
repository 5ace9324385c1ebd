//! The language of grub.cfg, as far as GRUB's own parser gives it meaning: words with quotes and
//! variables, lists of commands, `if`, `for`, `while`, functions, and commands with a block.

use std::rc::Rc;

/// Blocks in blocks.
const DEPTH_MAX: usize = 32;

pub(super) type Script = Rc<Vec<Command>>;

#[derive(Debug)]
pub(super) enum Command {
    /// A command with its arguments; `menuentry` and its like have a block.
    Simple {
        words: Vec<Word>,
        block: Option<Script>,
    },
    /// Conditions with what they lead to, the first that holds; then `else`.
    If {
        branches: Vec<(Script, Script)>,
        otherwise: Script,
    },
    For {
        variable: String,
        words: Vec<Word>,
        body: Script,
    },
    /// `until` is a loop while the condition doesn't hold.
    While {
        condition: Script,
        holds: bool,
        body: Script,
    },
    Function {
        name: String,
        body: Script,
    },
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Word {
    pub parts: Vec<Part>,
    /// Something of it stood in quotes: it is a word even if it is empty.
    pub is_quoted: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    /// Outside quotes a value falls apart into words at its blanks.
    Variable {
        name: String,
        is_quoted: bool,
    },
}

impl Word {
    /// The word, if it is plain text without quotes: only then can it be a keyword.
    fn plain(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Text(text)] if !self.is_quoted => Some(text),
            _ => None,
        }
    }
}

pub(super) fn parse(text: &str) -> Result<Script, String> {
    let mut parser = Parser { characters: text.chars().collect(), at: 0, depth: 0 };
    let (script, _) = parser.list(&[])?;
    Ok(script)
}

struct Parser {
    characters: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.characters.get(self.at).copied()
    }

    fn error<T>(&self, what: &str) -> Result<T, String> {
        let before = &self.characters[..self.at.min(self.characters.len())];
        let line = 1 + before.iter().filter(|&&character| character == '\n').count();
        Err(format!("line {line}: {what}"))
    }

    /// Over blanks, continued lines and comments, and line ends where they mean nothing.
    fn skip_blanks(&mut self, line_ends: bool) {
        while let Some(character) = self.peek() {
            match character {
                ' ' | '\t' | '\r' => self.at += 1,
                '\\' if self.characters.get(self.at + 1) == Some(&'\n') => self.at += 2,
                '\n' | ';' if line_ends => self.at += 1,
                '#' => {
                    while self.peek().is_some_and(|character| character != '\n') {
                        self.at += 1;
                    }
                }
                _ => break,
            }
        }
    }

    /// Commands up to one of the keywords in `ends` (or the end of the text, if there are none).
    fn list(&mut self, ends: &[&'static str]) -> Result<(Script, &'static str), String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return self.error("blocks too deep in blocks");
        }
        let mut commands = Vec::new();
        let end = loop {
            self.skip_blanks(true);
            if self.peek().is_none() {
                match ends {
                    [] => break "",
                    _ => return self.error(&format!("the text ends before {:?}", ends[0])),
                }
            }
            let start = self.at;
            if self.peek() == Some('}') {
                self.at += 1;
                match ends {
                    ["}"] => break "}",
                    _ => return self.error("a \"}\" that ends nothing"),
                }
            }
            let Some(word) = self.word()? else { return self.error("a \"{\" that begins nothing") };
            if let Some(end) = ends.iter().find(|&&end| word.plain() == Some(end)) {
                break *end;
            }
            commands.push(match word.plain() {
                Some("if") => self.condition()?,
                Some("for") => self.for_loop()?,
                Some(kind @ ("while" | "until")) => {
                    let holds = kind == "while";
                    let (condition, _) = self.list(&["do"])?;
                    let (body, _) = self.list(&["done"])?;
                    Command::While { condition, holds, body }
                }
                Some("function") => self.function()?,
                _ => {
                    self.at = start;
                    self.simple()?
                }
            });
        };
        self.depth -= 1;
        Ok((Rc::new(commands), end))
    }

    fn condition(&mut self) -> Result<Command, String> {
        let mut branches = Vec::new();
        loop {
            let (condition, _) = self.list(&["then"])?;
            let (body, end) = self.list(&["elif", "else", "fi"])?;
            branches.push((condition, body));
            match end {
                "elif" => {}
                "else" => {
                    let (otherwise, _) = self.list(&["fi"])?;
                    return Ok(Command::If { branches, otherwise });
                }
                _ => return Ok(Command::If { branches, otherwise: Rc::default() }),
            }
        }
    }

    fn for_loop(&mut self) -> Result<Command, String> {
        let Some(variable) = self.name()? else { return self.error("for without a variable") };
        if self.name()?.as_deref() != Some("in") {
            return self.error("for without \"in\"");
        }
        let words = self.words()?;
        self.skip_blanks(true);
        if self.name()?.as_deref() != Some("do") {
            return self.error("for without \"do\"");
        }
        let (body, _) = self.list(&["done"])?;
        Ok(Command::For { variable, words, body })
    }

    fn function(&mut self) -> Result<Command, String> {
        let Some(name) = self.name()? else { return self.error("a function without a name") };
        self.skip_blanks(true);
        let body = self.block()?;
        match body {
            Some(body) => Ok(Command::Function { name, body }),
            None => self.error("a function without a block"),
        }
    }

    fn simple(&mut self) -> Result<Command, String> {
        let words = self.words()?;
        Ok(Command::Simple { words, block: self.block()? })
    }

    fn block(&mut self) -> Result<Option<Script>, String> {
        if self.peek() != Some('{') {
            return Ok(None);
        }
        self.at += 1;
        self.list(&["}"]).map(|(body, _)| Some(body))
    }

    fn name(&mut self) -> Result<Option<String>, String> {
        self.skip_blanks(false);
        Ok(self.word()?.and_then(|word| word.plain().map(str::to_owned)))
    }

    /// Words up to the end of the command or the begin of its block.
    fn words(&mut self) -> Result<Vec<Word>, String> {
        let mut words = Vec::new();
        loop {
            self.skip_blanks(false);
            match self.word()? {
                Some(word) => words.push(word),
                None => return Ok(words),
            }
        }
    }

    /// `None` at what is no word: a line's end, a brace, the end.
    fn word(&mut self) -> Result<Option<Word>, String> {
        let mut word = Word::default();
        let mut text = String::new();
        let start = self.at;
        while let Some(character) = self.peek() {
            match character {
                ' ' | '\t' | '\r' | '\n' | ';' => break,
                '{' | '}' if self.at == start => break,
                '\'' => {
                    word.is_quoted = true;
                    self.at += 1;
                    text.push_str(&self.single_quoted()?);
                }
                '"' => {
                    word.is_quoted = true;
                    self.at += 1;
                    self.double_quoted(&mut word, &mut text)?;
                }
                '\\' => {
                    match self.characters.get(self.at + 1) {
                        Some('\n') | None => {}
                        Some(&next) => text.push(next),
                    }
                    self.at += 2;
                }
                '$' => self.variable(&mut word, &mut text, false),
                other => {
                    text.push(other);
                    self.at += 1;
                }
            }
        }
        if !text.is_empty() {
            word.parts.push(Part::Text(text));
        }
        let is_word = word.is_quoted || !word.parts.is_empty();
        Ok(is_word.then_some(word))
    }

    fn single_quoted(&mut self) -> Result<String, String> {
        let rest = &self.characters[self.at..];
        let Some(len) = rest.iter().position(|&character| character == '\'') else {
            return self.error("a quote that doesn't end");
        };
        self.at += len + 1;
        Ok(rest[..len].iter().collect())
    }

    fn double_quoted(&mut self, word: &mut Word, text: &mut String) -> Result<(), String> {
        loop {
            match self.peek() {
                None => return self.error("a quote that doesn't end"),
                Some('"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some('$') => self.variable(word, text, true),
                Some('\\') => {
                    match self.characters.get(self.at + 1) {
                        Some(&next @ ('"' | '$' | '\\')) => text.push(next),
                        Some('\n') => {}
                        Some(&other) => text.extend(['\\', other]),
                        None => return self.error("a quote that doesn't end"),
                    }
                    self.at += 2;
                }
                Some(other) => {
                    text.push(other);
                    self.at += 1;
                }
            }
        }
    }

    /// At a dollar sign: a variable, or the sign itself.
    fn variable(&mut self, word: &mut Word, text: &mut String, is_quoted: bool) {
        let rest = &self.characters[self.at + 1..];
        let in_name = |character: &&char| character.is_ascii_alphanumeric() || **character == '_';
        let (name, len) = match rest.first() {
            Some('{') => match rest.iter().position(|&character| character == '}') {
                Some(end) => (rest[1..end].iter().collect::<String>(), end + 1),
                None => (String::new(), 0),
            },
            Some(&special @ ('?' | '*' | '@' | '#' | '0'..='9')) => (special.to_string(), 1),
            _ => {
                let name: String = rest.iter().take_while(in_name).collect();
                let len = name.len();
                (name, len)
            }
        };
        self.at += 1 + len;
        if name.is_empty() {
            text.push('$');
            return;
        }
        if !text.is_empty() {
            word.parts.push(Part::Text(std::mem::take(text)));
        }
        word.parts.push(Part::Variable { name, is_quoted });
    }
}
