//! What a disk holds of a folder: now, and after the power has failed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use super::Op;

/// What the power left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// All that was done: as after a kill.
    All,
    /// What was synced, and nothing else: names of folders that were, content of files that were.
    Synced,
    /// All names, but content only where it was synced: a file that was not is empty.
    NamesFirst,
}

/// All views.
pub const VIEWS: [View; 3] = [View::All, View::Synced, View::NamesFirst];

/// Bytes of a file, by offset of each write; they do not overlap. What is in none is zero.
#[derive(Debug, Clone, Default)]
struct Content {
    len: u64,
    runs: BTreeMap<u64, Rc<[u8]>>,
    /// Another after each change.
    version: u64,
}

#[derive(Debug, Clone)]
enum Node {
    File {
        now: Content,
        synced: Content,
        /// Where the next bytes go.
        position: u64,
        appends: bool,
    },
    Dir {
        now: BTreeMap<String, usize>,
        synced: BTreeMap<String, usize>,
    },
}

/// A folder, as its disk sees it.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The first is the folder itself. None is ever taken out: a name may be on the disk when it is gone.
    nodes: Vec<Node>,
}

impl Default for Disk {
    fn default() -> Self {
        Self { nodes: vec![Node::Dir { now: BTreeMap::new(), synced: BTreeMap::new() }] }
    }
}

impl Content {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        self.cut(at, end);
        self.runs.insert(at, bytes.into());
        self.len = self.len.max(end);
    }

    /// Makes zeroes of a range.
    fn cut(&mut self, from: u64, to: u64) {
        self.version += 1;
        let touched: Vec<u64> = self.runs.range(..to).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(run) = self.runs.remove(&start) else { continue };
            let end = start + run.len() as u64;
            let part = |low: u64, high: u64| {
                let (low, high) = (usize::try_from(low - start), usize::try_from(high - start));
                Rc::from(run.get(low.unwrap_or(0)..high.unwrap_or(0)).unwrap_or_default())
            };
            if start < from {
                self.runs.insert(start, part(start, end.min(from)));
            }
            if end > to {
                self.runs.insert(start.max(to), part(start.max(to), end));
            }
        }
    }

    fn resize(&mut self, len: u64) {
        self.cut(len, u64::MAX);
        self.len = len;
    }

    fn copy(&mut self, other: &Self, from_at: u64, to_at: u64, len: u64) {
        self.cut(to_at, to_at + len);
        for (start, run) in &other.runs {
            let (low, high) = ((*start).max(from_at), (start + run.len() as u64).min(from_at + len));
            if low < high {
                let part = usize::try_from(low - start).ok().zip(usize::try_from(high - start).ok());
                let bytes = part.and_then(|(low, high)| run.get(low..high)).unwrap_or_default();
                self.runs.insert(to_at + low - from_at, bytes.into());
            }
        }
        self.len = self.len.max(to_at + len);
    }
}

impl Disk {
    /// Does what a program did.
    ///
    /// # Errors
    /// When it was done to a file that is not there: the record is not whole.
    pub fn apply(&mut self, op: &Op) -> Result<(), String> {
        self.try_apply(op).ok_or_else(|| format!("done to what is not there: {op}"))
    }

    fn try_apply(&mut self, op: &Op) -> Option<()> {
        match op {
            Op::MakeDir(path) => {
                let node = Node::Dir { now: BTreeMap::new(), synced: BTreeMap::new() };
                self.add(path, node)
            }
            Op::Open { path, cut, append } => self.open(path, *cut, *append),
            Op::Write { path, at, bytes } => self.write(path, *at, bytes),
            Op::Seek { path, to } => match self.node_mut(path)? {
                Node::File { position, .. } => {
                    *position = *to;
                    Some(())
                }
                Node::Dir { .. } => Some(()),
            },
            Op::Resize { path, len } => {
                self.content(path)?.resize(*len);
                Some(())
            }
            Op::Copy { from, from_at, to, to_at, len } => {
                let source = self.content(from)?.clone();
                self.content(to)?.copy(&source, *from_at, *to_at, *len);
                Some(())
            }
            Op::Rename { from, to } => {
                let id = self.take(from)?;
                let (names, name) = self.parent(to)?;
                names.insert(name, id);
                Some(())
            }
            Op::Remove(path) => self.take(path).map(drop),
            Op::Sync(path) => {
                match self.node_mut(path)? {
                    Node::File { now, synced, .. } => *synced = now.clone(),
                    Node::Dir { now, synced } => *synced = now.clone(),
                }
                Some(())
            }
        }
    }

    fn open(&mut self, path: &Path, cut: bool, append: bool) -> Option<()> {
        let (now, synced) = (Content::default(), Content::default());
        match self.find(path) {
            None => self.add(path, Node::File { now, synced, position: 0, appends: append }),
            Some(id) => match self.nodes.get_mut(id)? {
                Node::File { now, position, appends, .. } => {
                    (*position, *appends) = (0, append);
                    if cut {
                        now.resize(0);
                    }
                    Some(())
                }
                Node::Dir { .. } => None,
            },
        }
    }

    fn write(&mut self, path: &Path, at: Option<u64>, bytes: &[u8]) -> Option<()> {
        let Node::File { now, position, appends, .. } = self.node_mut(path)? else { return None };
        let start = at.unwrap_or(if *appends { now.len } else { *position });
        now.write(start, bytes);
        if at.is_none() {
            *position = start + bytes.len() as u64;
        }
        Some(())
    }

    fn find(&self, path: &Path) -> Option<usize> {
        path.components().try_fold(0, |id, part| match self.nodes.get(id)? {
            Node::Dir { now, .. } => now.get(part.as_os_str().to_str()?).copied(),
            Node::File { .. } => None,
        })
    }

    fn node_mut(&mut self, path: &Path) -> Option<&mut Node> {
        let id = self.find(path)?;
        self.nodes.get_mut(id)
    }

    fn content(&mut self, path: &Path) -> Option<&mut Content> {
        match self.node_mut(path)? {
            Node::File { now, .. } => Some(now),
            Node::Dir { .. } => None,
        }
    }

    fn parent(&mut self, path: &Path) -> Option<(&mut BTreeMap<String, usize>, String)> {
        let name = path.file_name()?.to_str()?.to_owned();
        match self.node_mut(path.parent()?)? {
            Node::Dir { now, .. } => Some((now, name)),
            Node::File { .. } => None,
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> Option<()> {
        let id = self.nodes.len();
        let (names, name) = self.parent(path)?;
        names.insert(name, id);
        self.nodes.push(node);
        Some(())
    }

    fn take(&mut self, path: &Path) -> Option<usize> {
        let (names, name) = self.parent(path)?;
        names.remove(&name)
    }

    /// Makes what the power left below a folder, which must be empty.
    ///
    /// # Errors
    /// A failed write.
    pub fn make(&self, view: View, folder: &Path) -> io::Result<()> {
        self.make_node(0, view, folder)
    }

    fn make_node(&self, id: usize, view: View, path: &Path) -> io::Result<()> {
        match self.nodes.get(id) {
            Some(Node::Dir { now, synced }) => {
                fs::create_dir_all(path)?;
                let names = if view == View::Synced { synced } else { now };
                names.iter().try_for_each(|(name, id)| self.make_node(*id, view, &path.join(name)))
            }
            Some(Node::File { now, synced, .. }) => {
                let content = if view == View::All { now } else { synced };
                let file = fs::File::create(path)?;
                file.set_len(content.len)?;
                content.runs.iter().try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))
            }
            None => Ok(()),
        }
    }

    /// What tells states of one disk from one another: names, and versions of content.
    #[must_use]
    pub fn state(&self, view: View) -> String {
        let mut state = String::new();
        self.state_of(0, view, &mut state);
        state
    }

    fn state_of(&self, id: usize, view: View, state: &mut String) {
        match self.nodes.get(id) {
            Some(Node::Dir { now, synced }) => {
                let names = if view == View::Synced { synced } else { now };
                for (name, id) in names {
                    state.push_str(&format!("{name}={id}"));
                    self.state_of(*id, view, state);
                }
                state.push('/');
            }
            Some(Node::File { now, synced, .. }) => {
                let content = if view == View::All { now } else { synced };
                state.push_str(&format!("@{},", content.version));
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(disk: &Disk, view: View) -> Vec<String> {
        let dir = std::env::temp_dir().join(format!("disk-{}-{view:?}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        disk.make(view, &dir).unwrap();
        let mut all = Vec::new();
        for entry in fs::read_dir(dir.join("d")).into_iter().flatten() {
            let entry = entry.unwrap();
            let text = fs::read_to_string(entry.path()).unwrap();
            all.push(format!("{}={text}", entry.file_name().to_string_lossy()));
        }
        fs::remove_dir_all(&dir).unwrap();
        all.sort();
        all
    }

    #[test]
    fn what_is_not_synced_is_not_there() {
        let mut disk = Disk::default();
        let mut seen = Vec::new();
        let path = |name: &str| std::path::PathBuf::from(format!("d/{name}"));
        let open = |name: &str| Op::Open { path: path(name), cut: true, append: false };
        let write = |name: &str, text: &str| Op::Write { path: path(name), at: None, bytes: text.into() };
        for op in [
            Op::MakeDir("d".into()),
            open("a"),
            write("a", "one "),
            write("a", "two"),
            Op::Sync(path("a")),
            write("a", "!"),
            Op::Rename { from: path("a"), to: path("b") },
            Op::Sync("d".into()),
        ] {
            disk.apply(&op).unwrap();
            seen.push(VIEWS.map(|view| listing(&disk, view)));
        }
        let is = |list: &[String], text: &str| assert_eq!(list.join(","), text);
        is(&seen[3][0], "a=one two");
        is(&seen[3][2], "a=");
        is(&seen[6][0], "b=one two!");
        is(&seen[6][2], "b=one two");
        is(&seen[7][1], "");
        assert!(disk.apply(&write("c", "x")).is_err());
    }

    #[test]
    fn content_is_cut_copied_and_written_over() {
        let mut content = Content::default();
        content.write(2, b"abcdef");
        content.write(4, b"XY");
        let text = |content: &Content| {
            let mut all = vec![b'.'; usize::try_from(content.len).unwrap()];
            for (at, run) in &content.runs {
                let at = usize::try_from(*at).unwrap();
                all[at..at + run.len()].copy_from_slice(run);
            }
            String::from_utf8(all).unwrap()
        };
        assert_eq!(text(&content), "..abXYef");
        let mut other = Content::default();
        other.copy(&content, 3, 1, 4);
        assert_eq!(text(&other), ".bXYe");
        content.resize(5);
        content.resize(7);
        assert_eq!(text(&content), "..abX..");
    }
}
