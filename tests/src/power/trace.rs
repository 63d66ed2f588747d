//! What `strace -f -y -xx` printed, as changes of files below one folder.

use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// A change of a file or a name; paths are relative to the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "paths, and offsets and lengths in bytes")]
pub enum Op {
    /// A folder appears.
    MakeDir(PathBuf),
    /// A file is opened for writing, made if it is missing, and cut to nothing if so asked.
    Open { path: PathBuf, cut: bool, append: bool },
    /// Bytes, here or where the last ones ended.
    Write { path: PathBuf, at: Option<u64>, bytes: Vec<u8> },
    /// The next bytes go here.
    Seek { path: PathBuf, to: u64 },
    /// Another length.
    Resize { path: PathBuf, len: u64 },
    /// Bytes of another file.
    Copy { from: PathBuf, from_at: u64, to: PathBuf, to_at: u64, len: u64 },
    /// Another name; what had it is gone.
    Rename { from: PathBuf, to: PathBuf },
    /// A name is gone.
    Remove(PathBuf),
    /// Content of the file, or names in the folder, are on the disk when it returns.
    Sync(PathBuf),
}

impl Op {
    /// Whether both write to one file.
    #[must_use]
    pub fn continues(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Write { path, .. }, Self::Write { path: same, .. }) => path == same,
            _ => false,
        }
    }

    /// Whether it is about the content of a file whose name ends so.
    #[must_use]
    pub fn is_in(&self, end: &str) -> bool {
        match self {
            Self::Write { path, .. } | Self::Sync(path) => path.to_string_lossy().ends_with(end),
            _ => false,
        }
    }

    /// The first half of what is written: a write may be torn. Not of what is under another name until it is whole.
    #[must_use]
    pub fn torn(&self) -> Option<Self> {
        let Self::Write { path, at, bytes } = self else { return None };
        let unfinished = ["tmp", "partial", "building"];
        if path.extension().is_some_and(|end| unfinished.iter().any(|other| end == *other)) {
            return None;
        }
        let bytes = bytes.get(..bytes.len() / 2).filter(|half| !half.is_empty())?.to_vec();
        Some(Self::Write { path: path.clone(), at: *at, bytes })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { path, at, bytes } => {
                write!(f, "Write({}, {at:?}, {} bytes)", path.display(), bytes.len())
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// One call with its arguments as they were printed.
struct Call<'a> {
    name: &'a str,
    args: Vec<&'a str>,
    result: i64,
}

/// Changes below `root`, in the order in which the calls ended.
///
/// # Errors
/// A call that changes something below `root` in a way that is not known here, or a line that is no call.
pub fn recorded(log: &str, root: &Path) -> Result<Vec<Op>, String> {
    let mut begun: HashMap<&str, String> = HashMap::new();
    let mut ops = Vec::new();
    for line in log.lines() {
        let (thread, text) = line.split_once(' ').ok_or_else(|| format!("no call: {line}"))?;
        let text = text.trim_start();
        if text.starts_with("+++") || text.starts_with("---") {
            continue;
        }
        if let Some(start) = text.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, start.to_owned());
            continue;
        }
        let whole = match text.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>")) {
            Some((_, rest)) => format!("{}{rest}", begun.remove(thread).unwrap_or_default()),
            None => text.to_owned(),
        };
        // A thread that ended in its call has no result.
        let Some(call) = parse(&whole) else { continue };
        if call.result >= 0
            && let Some(op) = change(&call, root).map_err(|why| format!("{why}: {}", short(&whole)))?
        {
            ops.push(op);
        }
    }
    Ok(ops)
}

fn short(line: &str) -> String {
    line.chars().take(300).collect()
}

/// `name(one, two) = result…`. Strings are in hexadecimal, so no comma and no bracket is in any.
fn parse(line: &str) -> Option<Call<'_>> {
    let (name, rest) = line.split_once('(')?;
    let (args, result) = rest.rsplit_once(" = ")?;
    let args = args.trim_end().strip_suffix(')')?;
    let number = result.split([' ', '<']).next()?;
    let result = match number.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16).ok()?,
        None => number.parse().ok()?,
    };
    Some(Call { name, args: args.split(", ").collect(), result })
}

/// The change that a call made below `root`; none if it made none there.
fn change(call: &Call<'_>, root: &Path) -> Result<Option<Op>, String> {
    let arg = |n: usize| call.args.get(n).copied().unwrap_or_default();
    let fd = |n| file(arg(n)).and_then(|path| below(&path, root));
    let name = |n| below(&text(arg(n)), root);
    let name_at = |n| below(&file(arg(n)).unwrap_or_default().join(text(arg(n + 1))), root);
    let number =
        |n| arg(n).trim_matches(['[', ']']).parse::<u64>().map_err(|_| format!("no number: {}", arg(n)));
    let result = u64::try_from(call.result).unwrap_or_default();
    Ok(match call.name {
        "openat" => opened(name_at(0), arg(2)),
        "mkdir" => name(0).map(Op::MakeDir),
        "mkdirat" => name_at(0).map(Op::MakeDir),
        "write" => fd(0).map(|path| Op::Write { path, at: None, bytes: head(arg(1), result) }),
        "pwrite64" => match fd(0) {
            Some(path) => Some(Op::Write { path, at: Some(number(3)?), bytes: head(arg(1), result) }),
            None => None,
        },
        "lseek" if arg(2) == "SEEK_SET" || arg(2) == "SEEK_END" => {
            fd(0).map(|path| Op::Seek { path, to: result })
        }
        "ftruncate" => match fd(0) {
            Some(path) => Some(Op::Resize { path, len: number(1)? }),
            None => None,
        },
        "copy_file_range" => match (fd(0), fd(2)) {
            (Some(from), Some(to)) => {
                let (from_at, to_at) = (before(arg(1))?, before(arg(3))?);
                Some(Op::Copy { from, from_at, to, to_at, len: result })
            }
            (_, None) => None,
            (None, Some(_)) => return Err("a copy from elsewhere".to_owned()),
        },
        "rename" => renamed(name(0), name(1))?,
        "renameat" | "renameat2" => renamed(name_at(0), name_at(2))?,
        "rmdir" | "unlink" => name(0).map(Op::Remove),
        "unlinkat" => name_at(0).map(Op::Remove),
        "fsync" | "fdatasync" => {
            let path = file(arg(0)).unwrap_or_default();
            let whole = (path == root).then(PathBuf::new);
            below(&path, root).or(whole).map(Op::Sync)
        }
        // Looking for data and holes changes nothing, and holes are made where there are zeroes.
        "lseek" => None,
        "fallocate" if arg(1).contains("FALLOC_FL_PUNCH_HOLE") => None,
        "ioctl" if !arg(1).starts_with("FICLONE") => None,
        _ => {
            let touched = (0..call.args.len()).any(|n| fd(n).is_some() || name(n).is_some());
            if touched {
                return Err("the model does not know this".to_owned());
            }
            None
        }
    })
}

fn opened(path: Option<PathBuf>, flags: &str) -> Option<Op> {
    let has = |flag| flags.split('|').any(|word| word == flag);
    let writes = has("O_WRONLY") || has("O_RDWR");
    let op = |path| Op::Open { path, cut: has("O_TRUNC"), append: has("O_APPEND") };
    path.filter(|_| writes && !has("O_PATH")).map(op)
}

fn renamed(from: Option<PathBuf>, to: Option<PathBuf>) -> Result<Option<Op>, String> {
    match (from, to) {
        (Some(from), Some(to)) => Ok(Some(Op::Rename { from, to })),
        (None, None) => Ok(None),
        _ => Err("a rename into the folder, or out of it".to_owned()),
    }
}

/// The number before a call, of `[0] => [4096]`, `[0]`.
fn before(text: &str) -> Result<u64, String> {
    let first = text.split(" => ").next().unwrap_or_default().trim_matches(['[', ']']);
    first.parse().map_err(|_| format!("no offset: {text}"))
}

/// The file behind `5<\x2f…>`; none if it has been removed, or is none.
fn file(text: &str) -> Option<PathBuf> {
    let inner = text.split_once('<')?.1.strip_suffix('>')?;
    Some(PathBuf::from(String::from_utf8_lossy(&bytes(inner)).into_owned()))
}

fn text(quoted: &str) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(&bytes(quoted)).into_owned())
}

/// The first so many bytes of a string.
fn head(quoted: &str, len: u64) -> Vec<u8> {
    let mut all = bytes(quoted);
    all.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    all
}

/// Bytes of `\x2f\x61`, in quotes or not.
fn bytes(text: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let escapes = text.trim_matches('"').as_bytes().chunks_exact(4);
    escapes
        .filter_map(|escape| match escape {
            [b'\\', b'x', high, low] => Some(digit(*high)? * 16 + digit(*low)?),
            _ => None,
        })
        .collect()
}

/// The path relative to the folder, if it is below it.
fn below(path: &Path, root: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(root).ok()?;
    let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !inside.as_os_str().is_empty()).then(|| inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> String {
        text.bytes().map(|byte| format!("\\x{byte:02x}")).collect()
    }

    #[test]
    fn calls_are_read_in_the_order_of_their_ends() {
        let file = hex("/s/a");
        let log = format!(
            "1  openat(AT_FDCWD<{cwd}>, \"{file}\", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 3<{file}>\n\
             1  write(3<{file}>, \"{hello}\", 5 <unfinished ...>\n\
             2  mkdir(\"{dir}\", 0700) = 0\n\
             2  mkdir(\"{dir}\", 0700) = -1 EEXIST (File exists)\n\
             1  <... write resumed>) = 4\n\
             1  pwrite64(3<{file}>, \"{hello}\", 5, 7) = 5\n\
             1  rename(\"{file}\", \"{to}\") = 0\n\
             1  fsync(4<{root}>) = 0\n\
             1  fsync(4<{store}>) = 0\n\
             1  write(9<{other}>, \"{hello}\", 5) = 5\n\
             1  unlinkat(4<{dir}>, \"{name}\", 0) = 0\n\
             1  write(3<{to}>(deleted), \"{hello}\", 5) = 5\n\
             2  copy_file_range(3<{to}>, [0] => [5], 4<{file}>, [1] => [6], 9, 0) = 5\n\
             1  +++ exited with 0 +++\n",
            cwd = hex("/"),
            hello = hex("hello"),
            dir = hex("/s/d"),
            to = hex("/s/b"),
            root = hex("/s/d"),
            store = hex("/s"),
            other = hex("/other"),
            name = hex("x"),
        );
        let (a, b, d) = (PathBuf::from("a"), PathBuf::from("b"), PathBuf::from("d"));
        let ops = recorded(&log, Path::new("/s")).unwrap();
        assert_eq!(
            ops,
            [
                Op::Open { path: a.clone(), cut: true, append: false },
                Op::MakeDir(d.clone()),
                Op::Write { path: a.clone(), at: None, bytes: b"hell".to_vec() },
                Op::Write { path: a.clone(), at: Some(7), bytes: b"hello".to_vec() },
                Op::Rename { from: a.clone(), to: b.clone() },
                Op::Sync(d),
                Op::Sync(PathBuf::new()),
                Op::Remove("d/x".into()),
                Op::Copy { from: b, from_at: 0, to: a, to_at: 1, len: 5 },
            ]
        );
    }

    #[test]
    fn what_the_model_does_not_know_is_no_small_matter() {
        let log = format!("1  symlink(\"{}\", \"{}\") = 0\n", hex("/x"), hex("/s/l"));
        assert!(recorded(&log, Path::new("/s")).unwrap_err().contains("does not know"));
        assert_eq!(recorded(&log, Path::new("/elsewhere")).unwrap(), []);
        let log = format!("1  rename(\"{}\", \"{}\") = 0\n", hex("/x"), hex("/s/l"));
        assert!(recorded(&log, Path::new("/s")).is_err());
    }
}
