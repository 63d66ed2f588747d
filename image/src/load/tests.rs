//! Archives as Docker, podman and skopeo write them, and archives as an attacker would.

use std::io::Write;

use super::*;
use crate::testing::{Sample, blobs, index, leftovers, noise, store};

/// A tar writer for tests: any header, true or not.
#[derive(Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    fn header(mut self, name: &str, kind: u8, size: u64, link: &str) -> Self {
        let mut block = [0_u8; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..263].copy_from_slice(b"ustar\0");
        block[148..156].copy_from_slice(b"        ");
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&block);
        self
    }

    fn content(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, bytes: &[u8]) -> Self {
        self.header(name, b'0', bytes.len() as u64, "").content(bytes)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// What `docker save` wrote before version 25.
pub(crate) fn docker_archive(sample: &Sample, tag: &str) -> Vec<u8> {
    let mut tar = Tar::default();
    let mut names = Vec::new();
    for (n, layer) in sample.layers.iter().enumerate() {
        let name = format!("{n:064}/layer.tar");
        tar = tar
            .header(&format!("{n:064}/"), b'5', 0, "")
            .file(&format!("{n:064}/VERSION"), b"1.0")
            .file(&name, layer);
        names.push(format!("\"{name}\""));
    }
    let config = format!("{}.json", sample.id().hex());
    let table = format!(r#"[{{"Config":"{config}","RepoTags":["{tag}"],"Layers":[{}]}}]"#, names.join(","));
    tar.file(&config, &sample.config)
        .file("manifest.json", table.as_bytes())
        .file("repositories", b"{}")
        .end()
}

fn layout_files(sample: &Sample, annotation: &str) -> Vec<(String, Vec<u8>)> {
    let top = String::from_utf8(index(&[("linux/amd64", &sample.manifest)])).unwrap();
    let named = top.replace("\"platform\"", &format!("\"annotations\":{{{annotation}}},\"platform\""));
    let mut files = vec![
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".to_owned(), named.into_bytes()),
    ];
    for blob in sample.blobs() {
        files.push((format!("blobs/sha256/{}", Digest::of(blob).hex()), blob.to_vec()));
    }
    files
}

fn layout_archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    files.iter().fold(Tar::default(), |tar, (name, bytes)| tar.file(&format!("./{name}"), bytes)).end()
}

async fn load_bytes(store: &Store, bytes: Vec<u8>) -> Result<Vec<LoadedImage>> {
    load(store, Cursor::new(bytes), &LoadOptions::default()).await
}

async fn fails(bytes: Vec<u8>) -> String {
    let (dir, store) = store();
    let line = load_bytes(&store, bytes).await.unwrap_err().one_line();
    assert!(line.len() < 500 && !line.contains('\n'), "{line}");
    assert!(store.images().unwrap().is_empty());
    assert_eq!(leftovers(dir.path()), Vec::<String>::new());
    line
}

const NAME: &str =
    r#""io.containerd.image.name":"docker.io/library/a:1","org.opencontainers.image.ref.name":"1""#;

#[tokio::test]
async fn docker_archives() {
    let (dir, store) = store();
    let sample = Sample::new(1, "amd64", &[1000, 2000, 0]);
    let loaded = load_bytes(&store, docker_archive(&sample, "a:1")).await.unwrap();
    assert_eq!(loaded.len(), 1);
    assert_eq!(
        (loaded[0].references[0].to_string(), loaded[0].image.id.clone()),
        ("a:1".into(), sample.id())
    );
    assert_eq!(store.resolve("a:1").unwrap().layers.len(), 3);
    assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 5));
    load_bytes(&store, docker_archive(&sample, "a:2")).await.unwrap();
    assert_eq!((blobs(dir.path()), store.resolve("a:2").unwrap().references.len()), (5, 2));
}

#[tokio::test]
async fn compressed_archives() {
    let (_dir, store) = store();
    let sample = Sample::new(1, "amd64", &[1000]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&docker_archive(&sample, "a:1")).unwrap();
    let bytes = gzip.finish().unwrap();
    load_bytes(&store, bytes.clone()).await.unwrap();
    let line = fails(bytes[..bytes.len() / 2].to_vec()).await;
    assert!(line.starts_with("cannot read the image archive"), "{line}");
}

/// Equal layers are written once, and linked; so does podman with the names of old times.
#[tokio::test]
async fn layers_that_are_links() {
    let (_dir, store) = store();
    let sample = Sample::new(1, "amd64", &[1000]);
    let config = String::from_utf8(sample.config.clone()).unwrap();
    let id = format!("\"{}\"", Digest::of(&sample.layers[0]));
    let config = config.replace(&id, &format!("{id},{id}"));
    let table = r#"[{"Config":"c.json","RepoTags":null,"Layers":["one/layer.tar","two/layer.tar"]}]"#;
    let tar = |target: &str| {
        Tar::default()
            .header("two/layer.tar", b'2', 0, target)
            .file("one/layer.tar", &sample.layers[0])
            .file("c.json", config.as_bytes())
            .file("manifest.json", table.as_bytes())
            .end()
    };
    let loaded = load_bytes(&store, tar("../one/layer.tar")).await.unwrap();
    assert_eq!((loaded[0].image.layers.len(), loaded[0].references.len()), (2, 0));
    for target in ["/etc/passwd", "../../etc/passwd", "../one/../../x", "layer.tar", "../manifest.json"] {
        let line = fails(tar(target)).await;
        assert!(line.contains("\"two/layer.tar\" is named but not there"), "{line}");
    }
}

#[tokio::test]
async fn layouts() {
    let sample = Sample::new(1, "amd64", &[1000, 2000]);
    let files = layout_files(&sample, NAME);
    let (dir, store) = store();
    let loaded = load_bytes(&store, layout_archive(&files)).await.unwrap();
    assert_eq!(
        (loaded[0].references[0].to_string(), loaded[0].image.manifest_digest.clone()),
        ("a:1".into(), sample.digest())
    );
    assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 4));

    let layout = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(layout.path().join("blobs/sha256")).unwrap();
    for (name, bytes) in &files {
        std::fs::write(layout.path().join(name), bytes).unwrap();
    }
    let (_dir, other) = crate::testing::store();
    load_path(&other, layout.path(), &LoadOptions::default()).await.unwrap();
    assert_eq!(other.resolve("a:1").unwrap().id, sample.id());
    let layer = layout.path().join("blobs/sha256").join(Digest::of(&sample.layers[0]).hex());
    std::fs::remove_file(&layer).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &layer).unwrap();
    let (_dir, third) = crate::testing::store();
    let line = load_path(&third, layout.path(), &LoadOptions::default()).await.unwrap_err().one_line();
    assert!(line.contains("is no regular file"), "{line}");
}

/// `docker save` since version 25: a layout with the old table beside it, which has the names.
#[tokio::test]
async fn layouts_with_dockers_table() {
    let (_dir, store) = store();
    let sample = Sample::new(1, "amd64", &[1000]);
    let mut files = layout_files(&sample, r#""org.opencontainers.image.ref.name":"latest""#);
    let table = format!(
        r#"[{{"Config":"blobs/sha256/{}","RepoTags":["b:2","b:3"],"Layers":[]}}]"#,
        sample.id().hex()
    );
    files.push(("manifest.json".into(), table.into_bytes()));
    let loaded = load_bytes(&store, layout_archive(&files)).await.unwrap();
    let names: Vec<String> = loaded[0].references.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["b:2", "b:3"]);
}

#[tokio::test]
async fn what_is_no_archive() {
    for (bytes, says) in [
        (Vec::new(), "it is empty"),
        (b"x".to_vec(), "it ends in the middle of a header"),
        (noise(1, 5000), "it is no tar file"),
        (vec![0; 2048], "neither an index.json nor a manifest.json"),
        (b"\xfd7zXZ\0 and so on".to_vec(), "compressed with xz"),
        (b"BZh91".to_vec(), "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd12".to_vec(), "compressed with zstd"),
        (Tar::default().file("manifest.json", b"[]").end(), "it contains no image"),
        (Tar::default().file("manifest.json", b"{").end(), "manifest.json is malformed"),
        (Tar::default().file("index.json", b"{}").end(), "is malformed"),
    ] {
        let line = fails(bytes).await;
        assert!(line.contains(says), "{line}");
    }
}

#[tokio::test]
async fn hostile_members() {
    let long = "a/".repeat(400);
    let long_name = |kind: u8| {
        Tar::default().header("././@LongLink", kind, long.len() as u64, "").content(long.as_bytes())
    };
    let pax = |record: &str| {
        let whole = format!("{} {record}\n", record.len() + 4);
        Tar::default()
            .header("x", b'x', whole.len() as u64, "")
            .content(whole.as_bytes())
            .file("a.json", b"{}")
            .end()
    };
    for (bytes, says) in [
        (
            Tar::default().file("/etc/passwd.json", b"").end(),
            "member name \"/etc/passwd.json\" is not allowed",
        ),
        (Tar::default().file("../x.json", b"").end(), "is not allowed"),
        (Tar::default().file("a/../../x.json", b"").end(), "is not allowed"),
        (Tar::default().file("a\x1b[31m.json", b"").end(), "member name \"a[31m.json\" is not allowed"),
        (Tar::default().header("a.tar", b'1', 0, "b.tar").end(), "is a hard link"),
        (Tar::default().header("a.tar", b'3', 0, "").end(), "is of kind 0x33"),
        (Tar::default().header("a.tar", b'6', 0, "").end(), "is of kind 0x36"),
        (Tar::default().header("a.tar", b'S', 0, "").end(), "is of kind 0x53"),
        (Tar::default().file("a.json", b"1").file("./a.json", b"2").end(), "occurs twice"),
        (
            Tar::default().header("a.tar", b'0', 1 << 32, "").content(b"x").end(),
            "it ends in the middle of a member",
        ),
        (
            Tar::default().header("other", b'0', 1 << 32, "").content(b"x").end(),
            "it ends in the middle of a member",
        ),
        (Tar::default().header("index.json", b'0', 1 << 30, "").end(), "is too large"),
        (Tar::default().header("x", b'x', 1 << 30, "").end(), "extension header of 1073741824 bytes"),
        (long_name(b'L').file("x.json", b"").end(), "is not allowed"),
        (pax("path=../../x.json"), "is not allowed"),
        (pax("size=99999999999999999999"), "malformed pax header"),
        (pax("GNU.sparse.major=1"), "sparse member"),
        (pax("no equals sign"), "malformed pax header"),
        (pax("path=b.tar").tap(|bytes| bytes[512] = b'9'), "malformed pax header"),
    ] {
        let line = fails(bytes).await;
        assert!(line.contains(says), "wanted {says}: {line}");
    }
}

#[tokio::test]
async fn hostile_tables() {
    let sample = Sample::new(1, "amd64", &[100]);
    let docker = |table: &str| {
        let tar = Tar::default()
            .file("c.json", &sample.config)
            .file("l.tar", &sample.layers[0])
            .file("m.tar", b"other");
        tar.file("manifest.json", table.as_bytes()).end()
    };
    for (table, says) in [
        (r#"[{"Config":"../../etc/passwd","Layers":[]}]"#, "is not allowed"),
        (r#"[{"Config":"/etc/passwd","Layers":[]}]"#, "is not allowed"),
        (r#"[{"Config":"gone.json","Layers":[]}]"#, "\"gone.json\" is named but not there"),
        (r#"[{"Config":"c.json","Layers":[]}]"#, "it lists 1 layers but the archive 0"),
        (r#"[{"Config":"c.json","Layers":["m.tar"]}]"#, "wrong digest: layer \"m.tar\""),
        (r#"[{"Config":"c.json","Layers":["l.tar"],"RepoTags":["A B"]}]"#, "invalid reference format"),
        (r#"[{"Config":"l.tar","Layers":[]}]"#, "is malformed"),
    ] {
        let line = fails(docker(table)).await;
        assert!(line.contains(says), "wanted {says}: {line}");
    }
    let mut files = layout_files(&sample, NAME);
    let layer =
        files.iter().position(|(name, _)| name.ends_with(Digest::of(&sample.layers[0]).hex())).unwrap();
    files[layer].1[0] ^= 1;
    assert!(fails(layout_archive(&files)).await.starts_with("wrong digest: member \"blobs/sha256/"));
    files.remove(layer);
    assert!(fails(layout_archive(&files)).await.contains("is named but not there"));
    let arm = Sample::new(1, "arm64", &[100]);
    assert!(fails(docker_archive(&arm, "a:1")).await.contains("it has linux/arm64"));
}

#[tokio::test]
async fn the_sum_of_an_archive_is_bounded() {
    let (_dir, store) = store();
    let bytes = docker_archive(&Sample::new(1, "amd64", &[5000, 5000]), "a:1");
    let options = LoadOptions { max_bytes: 9000, ..LoadOptions::default() };
    let line = load(&store, Cursor::new(bytes), &options).await.unwrap_err().one_line();
    assert!(line.starts_with("image archive is too large"), "{line}");
}

#[tokio::test]
async fn a_full_disk_leaves_nothing() {
    let (dir, store) = store();
    store.set_write_budget(1500);
    let bytes = docker_archive(&Sample::new(1, "amd64", &[1000, 1000]), "a:1");
    let line = load_bytes(&store, bytes).await.unwrap_err().one_line();
    assert!(line.starts_with("no space left on device"), "{line}");
    assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 0));
}

/// Every truncation and many corruptions of a good archive end in an error or in a good image.
#[tokio::test]
async fn damaged_archives_never_panic() {
    let good = docker_archive(&Sample::new(1, "amd64", &[600, 10]), "a:1");
    let (_dir, store) = store();
    for end in (0..good.len()).step_by(97) {
        let _ = load_bytes(&store, good[..end].to_vec()).await;
    }
    for (at, byte) in noise(7, 600).chunks(3).map(|n| (usize::from(n[0]) * 256 + usize::from(n[1]), n[2])) {
        let mut bytes = good.clone();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = load_bytes(&store, bytes).await;
    }
    for image in store.images().unwrap() {
        store.layer_blobs(&image).unwrap();
    }
}

/// Changes a value in passing.
trait Tap: Sized {
    fn tap(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Tap for Vec<u8> {}
