//! Names, removal, collection, disks, leftovers: what the store promises between two pulls.

use super::disk::DiskEntry;
use super::gc::PruneScope;
use super::images::{Removed, Used};
use super::*;
use crate::testing::{Sample, blobs, leftovers, put, store};
use crate::{Image, Reference};

const FORMAT_NAME: &str = "test-1";

fn samples() -> (Sample, Sample) {
    (Sample::new(1, "amd64", &[100, 200]), Sample::new(2, "amd64", &[200, 300]))
}

fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

fn used_by(image: &Image, container: &str) -> Used {
    Used { images: [(image.id.clone(), format!("container {container}"))].into(), ..Used::default() }
}

fn untagged(text: &str) -> Removed {
    Removed::Untagged(text.to_owned())
}

async fn build(store: &Store, image: &Image, content: &[u8]) -> PathBuf {
    let DiskEntry::Build(build) = store.disk(image, FORMAT_NAME, Duration::ZERO).await.unwrap() else {
        panic!("built already")
    };
    fs::write(build.path(), content).unwrap();
    build.commit().await.unwrap()
}

#[test]
fn images_are_found_by_every_name() {
    let (_dir, store) = store();
    let (one, two) = samples();
    put(&store, &one, Some("nginx"));
    put(&store, &two, None);
    let id = one.id();
    for query in [
        "nginx".to_owned(),
        "nginx:latest".into(),
        "docker.io/library/nginx".into(),
        format!("nginx@{}", one.digest()),
        id.to_string(),
        id.hex().to_owned(),
        id.short().to_owned(),
        id.hex()[..4].to_owned(),
        format!("sha256:{}", id.short()),
        one.digest().to_string(),
    ] {
        assert_eq!(store.resolve(&query).unwrap().id, id, "{query}");
    }
    for query in
        ["", "redis", "nginx:1", "library/nginx:", "sha256:", "zz", &format!("redis@{}", one.digest())]
    {
        let line = store.resolve(query).unwrap_err().one_line();
        assert_eq!(line, format!("no such image: {query}"));
    }
    let all = store.images().unwrap();
    assert_eq!(
        all.iter().map(|image| image.id.clone()).collect::<Vec<_>>(),
        [two.id(), one.id()],
        "newest first"
    );
    assert_eq!(store.config_json(&all[1]).unwrap(), one.config);
    assert_eq!(all[1].size_bytes, 300 + (one.config.len() + one.manifest.len()) as u64);
}

#[test]
fn short_ids_may_be_ambiguous() {
    let (_dir, store) = store();
    let ids: Vec<Digest> =
        (1..40).map(|seed| put(&store, &Sample::new(seed, "amd64", &[1]), None).id).collect();
    let first = &ids[0].hex()[..1];
    let count = ids.iter().filter(|id| id.hex().starts_with(first)).count();
    match store.resolve(first) {
        Ok(image) => assert_eq!((count, image.id), (1, ids[0].clone())),
        Err(error) => {
            assert_eq!(error.one_line(), format!("image id \"{first}\" is ambiguous: it fits {count} images"))
        }
    }
    assert!(
        ids.iter().any(|id| matches!(store.resolve(&id.hex()[..1]), Err(ImageError::AmbiguousId { .. })))
    );
}

#[test]
fn tags_move() {
    let (_dir, store) = store();
    let (one, two) = samples();
    put(&store, &one, Some("a:1"));
    put(&store, &two, Some("b:1"));
    store.tag("a:1", &name("b:1")).unwrap();
    store.tag(two.id().short(), &name("c:1")).unwrap();
    assert_eq!(store.resolve("b:1").unwrap().id, one.id());
    assert_eq!(store.resolve("c:1").unwrap().references, [name("c:1")]);
    assert!(store.tag("a:1", &name("b").with_digest(one.digest())).is_err());
    assert!(store.tag("gone", &name("b:1")).is_err());
}

#[test]
fn removal_has_dockers_manners() {
    let (dir, store) = store();
    let (one, two) = samples();
    let (one, _two) = (put(&store, &one, Some("a:1")), put(&store, &two, Some("b:1")));
    store.tag("a:1", &name("a:2")).unwrap();
    let removal = store.remove("a:1", false, &used_by(&one, "web")).unwrap();
    assert_eq!(removal.removed, [untagged("a:1")], "not the last name, so it may go");
    let line = store.remove("a:2", false, &used_by(&one, "web")).unwrap_err().one_line();
    let id = one.id.short();
    assert_eq!(
        line,
        format!("conflict: unable to remove \"a:2\" (must be forced): container web is using image {id}")
    );
    let removal = store.remove("a:2", true, &used_by(&one, "web")).unwrap();
    assert_eq!(removal.removed, [untagged("a:2")], "what a container uses stays");
    assert!(store.layer_blobs(&store.resolve(id).unwrap()).is_ok());
    let removal = store.remove(id, false, &Used::default()).unwrap();
    let digest = format!("a@{}", one.manifest_digest);
    assert_eq!(removal.removed, [untagged(&digest), Removed::Deleted(one.id.clone())]);
    // Configuration, manifest and the layer that the other image does not share.
    assert_eq!((removal.freed.blobs, removal.freed.deferred), (3, false));
    assert_eq!((blobs(dir.path()), store.images().unwrap().len()), (4, 1));
}

#[test]
fn removal_by_id_of_an_image_with_several_names() {
    let (dir, store) = store();
    let image = put(&store, &samples().0, Some("a:1"));
    store.tag("a:1", &name("b:1")).unwrap();
    let id = image.id.short();
    let line = store.remove(id, false, &Used::default()).unwrap_err().one_line();
    assert_eq!(
        line,
        format!("conflict: unable to delete {id} (must be forced): image is referenced as a:1, b:1")
    );
    let removal = store.remove(id, true, &Used::default()).unwrap();
    assert_eq!(removal.removed.len(), 4);
    assert_eq!(blobs(dir.path()), 0);
}

#[tokio::test]
async fn nothing_is_deleted_while_someone_holds() {
    let (dir, store) = store();
    put(&store, &samples().0, Some("a:1"));
    let other = Store::open(dir.path()).unwrap();
    let hold = other.hold().await.unwrap();
    let removal = store.remove("a:1", false, &Used::default()).unwrap();
    assert!(removal.freed.deferred);
    assert_eq!(blobs(dir.path()), 4);
    assert!(store.gc(&Used::default()).unwrap().deferred);
    drop(hold);
    assert_eq!(store.gc(&Used::default()).unwrap().blobs, 4);
    assert_eq!(blobs(dir.path()), 0);
}

#[test]
fn pruning() {
    let (dir, store) = store();
    let (one, two) = samples();
    let (one, two) = (put(&store, &one, Some("a:1")), put(&store, &two, None));
    let three = put(&store, &Sample::new(7, "amd64", &[5]), Some("c:1"));
    let removal = store.prune(PruneScope::Dangling, &Used::default()).unwrap();
    assert_eq!(removal.removed, [Removed::Deleted(two.id)]);
    let removal = store.prune(PruneScope::Unused, &used_by(&one, "web")).unwrap();
    assert_eq!(removal.removed, [untagged("docker.io/library/c:1"), Removed::Deleted(three.id)]);
    assert_eq!(blobs(dir.path()), 4);
}

#[test]
fn collection_spares_the_recent_unless_told_otherwise() {
    let (dir, store) = store();
    put(&store, &samples().0, Some("a:1"));
    store.put_blob(b"finished just before a crash").unwrap();
    fs::write(store.ingest_dir().join(format!("{}.partial", Digest::of(b"x").hex())), b"half").unwrap();
    store.collect(false, &Default::default(), &Used::default()).unwrap();
    assert_eq!((blobs(dir.path()), leftovers(dir.path()).len()), (5, 1));
    let report = store.gc(&Used::default()).unwrap();
    assert_eq!((report.blobs, blobs(dir.path()), leftovers(dir.path())), (1, 4, vec![]));
    assert!(report.freed_bytes > 0);
}

#[test]
fn opening_reclaims_leftovers() {
    let (dir, store) = store();
    let image = put(&store, &samples().0, Some("a:1"));
    let touch = |path: PathBuf, age_s: u64| {
        let mut file = File::create(path).unwrap();
        file.write_all(b"x").unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age_s)).unwrap();
    };
    touch(store.temp_path(), 0);
    touch(store.ingest_dir().join("new.partial"), 60);
    touch(store.ingest_dir().join("old.partial"), 8 * 24 * 3600);
    File::create(store.ingest_dir().join("empty.partial")).unwrap();
    touch(store.disks_dir().join("key.test-1.1-2-3.building"), 0);
    touch(store.disks_dir().join("key.test-1.lock"), 0);
    Store::open(dir.path()).unwrap();
    assert_eq!(leftovers(dir.path()), ["new.partial"]);
    assert_eq!(list(&store.disks_dir()).unwrap().len(), 0);
    assert_eq!(store.resolve("a:1").unwrap().id, image.id);
}

#[test]
fn foreign_and_damaged_stores_are_refused() {
    let (dir, store) = store();
    fs::write(dir.path().join("images.json"), b"{\"version\":1,").unwrap();
    let line = store.images().unwrap_err().one_line();
    assert!(line.starts_with("image store is damaged: its index cannot be read"), "{line}");
    assert!(store.tag("a", &name("b")).is_err());
    fs::write(dir.path().join("images.json"), br#"{"version":2,"images":{},"references":{}}"#).unwrap();
    assert!(store.images().unwrap_err().one_line().contains("unknown version"));
    fs::write(dir.path().join("version"), b"99\n").unwrap();
    let line = Store::open(dir.path()).unwrap_err().one_line();
    assert!(
        line.ends_with("has format \"99\\n\", this program knows \"1\"") || line.contains("\"99\""),
        "{line}"
    );
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    assert!(Store::open(&file).unwrap_err().one_line().starts_with("cannot create directory"));
}

#[test]
fn damaged_images_are_told() {
    let (_dir, store) = store();
    let (one, two) = samples();
    put(&store, &one, Some("a:1"));
    put(&store, &two, Some("b:1"));
    fs::write(store.blob_path(&one.id()), b"{}").unwrap();
    assert!(store.resolve("a:1").unwrap_err().one_line().contains("does not match its digest"));
    fs::remove_file(store.blob_path(&one.id())).unwrap();
    assert!(store.resolve("a:1").unwrap_err().one_line().contains("pull the image again"));
    assert_eq!(store.images().unwrap().len(), 1, "the others are still listed");
    fs::remove_file(store.blob_path(&Digest::of(&two.layers[1]))).unwrap();
    let error = store.layer_blobs(&store.resolve("b:1").unwrap()).unwrap_err();
    assert!(error.one_line().contains("a layer is missing"));
    put(&store, &one, Some("a:1"));
    assert!(store.resolve("a:1").is_ok());
}

#[test]
fn content_is_private_and_read_only() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, store) = store();
    let mut content: &[u8] = b"content";
    let staged = store.stage(&mut content, 100, "x").unwrap();
    let digest = store.commit(staged).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&store.blob_path(&digest)), 0o444);
    assert_eq!(mode(&store.blobs_dir()), 0o700);
    let mut long: &[u8] = &[0; 101];
    assert!(matches!(store.stage(&mut long, 100, "x"), Err(ImageError::TooLarge { .. })));
}

#[tokio::test]
async fn one_builder_at_a_time() {
    let (dir, store) = store();
    let image = put(&store, &samples().0, Some("a:1"));
    assert_eq!(store.disk_path(&image, FORMAT_NAME).unwrap(), None);
    let DiskEntry::Build(build) = store.disk(&image, FORMAT_NAME, Duration::ZERO).await.unwrap() else {
        panic!()
    };
    assert_eq!(build.layers().len(), 2);
    assert_eq!(fs::read(&build.layers()[0].path).unwrap(), samples().0.layers[0]);
    let other = Store::open(dir.path()).unwrap();
    let error = other.disk(&image, FORMAT_NAME, Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, ImageError::LockTimeout { .. }));
    let waiting = tokio::spawn({
        let image = image.clone();
        async move { other.disk(&image, FORMAT_NAME, Duration::from_secs(60)).await }
    });
    fs::write(build.path(), b"disk").unwrap();
    let path = build.commit().await.unwrap();
    assert!(matches!(waiting.await.unwrap().unwrap(), DiskEntry::Ready(ready) if ready == path));
    assert_eq!(store.disk_path(&image, FORMAT_NAME).unwrap(), Some(path.clone()));
    assert_eq!(fs::read(&path).unwrap(), b"disk");
    assert!(fs::metadata(&path).unwrap().permissions().readonly());
    assert_eq!(store.disk_path(&image, "test-2").unwrap(), None, "another format is another disk");
}

#[tokio::test]
async fn builders_that_give_up_leave_nothing() {
    let (_dir, store) = store();
    let image = put(&store, &samples().0, Some("a:1"));
    let DiskEntry::Build(build) = store.disk(&image, FORMAT_NAME, Duration::ZERO).await.unwrap() else {
        panic!()
    };
    let first = build.path().to_owned();
    fs::write(&first, b"half").unwrap();
    drop(build);
    assert!(!first.exists());
    let DiskEntry::Build(build) = store.disk(&image, FORMAT_NAME, Duration::ZERO).await.unwrap() else {
        panic!()
    };
    assert_ne!(build.path(), first, "a builder that lives on cannot write to the next one's file");
    assert!(build.commit().await.is_err(), "nothing was written");
    for format in ["", "lock", "building", "../x", "A", "a.b", &"x".repeat(33)] {
        assert!(store.disk_path(&image, format).is_err(), "{format}");
    }
}

#[tokio::test]
async fn disks_go_with_their_images_unless_used() {
    let (_dir, store) = store();
    let (one, two) = samples();
    let (one, two) = (put(&store, &one, Some("a:1")), put(&store, &two, Some("b:1")));
    let (first, second) = (build(&store, &one, b"1").await, build(&store, &two, b"2").await);
    let used = Used { disks: [second.clone()].into(), ..Used::default() };
    store.remove("a:1", false, &used).unwrap();
    assert!(!first.exists() && second.exists());
    store.remove("b:1", false, &used).unwrap();
    assert!(second.exists(), "a container has it");
    store.gc(&Used::default()).unwrap();
    assert!(!second.exists());
}

/// An image that claims to unpack to another one's layers must not be able to plant that one's disk.
#[test]
fn disks_are_named_by_checked_content() {
    let (_dir, store) = store();
    let honest = Sample::new(1, "amd64", &[100]);
    let layers = vec![crate::testing::noise(99, 100)];
    let gzip = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    // The same claims under another layer; a comment makes it another image.
    let config = [honest.config.as_slice(), b" "].concat();
    let manifest = crate::testing::manifest(&config, &layers, gzip);
    let liar = Sample { manifest, config, layers };
    let (honest, liar) = (put(&store, &honest, None), put(&store, &liar, None));
    assert_eq!(honest.layers[0].diff_id, liar.layers[0].diff_id);
    assert_ne!(disk::layers_key(&honest.layers), disk::layers_key(&liar.layers));
}

/// Several handles change names at once and none is lost.
#[test]
fn changes_of_several_processes_add_up() {
    let (dir, store) = store();
    put(&store, &samples().0, Some("a:1"));
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let store = Store::open(dir.path()).unwrap();
            scope.spawn(move || {
                for n in 0..10 {
                    store.tag("a:1", &name(&format!("w{worker}:{n}"))).unwrap();
                }
            });
        }
    });
    assert_eq!(store.resolve("a:1").unwrap().references.len(), 41);
}
